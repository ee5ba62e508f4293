package dev.mobilevd.demo;

import android.content.ContentResolver;
import android.content.Context;
import android.content.SharedPreferences;
import android.database.Cursor;
import android.graphics.Bitmap;
import android.net.Uri;
import android.os.Handler;
import android.os.Looper;
import android.os.SystemClock;
import android.provider.OpenableColumns;
import dev.mobilevd.core.Artifact;
import dev.mobilevd.core.ArtifactStore;
import dev.mobilevd.core.Backend;
import dev.mobilevd.core.ByteSize;
import dev.mobilevd.core.Cancellation;
import dev.mobilevd.core.Clip;
import dev.mobilevd.core.ComponentRun;
import dev.mobilevd.core.Manifest;
import dev.mobilevd.core.MobileVdException;
import dev.mobilevd.core.Noise;
import dev.mobilevd.core.Pipeline;
import dev.mobilevd.core.Problem;
import dev.mobilevd.core.Progress;
import dev.mobilevd.core.RunTrace;
import dev.mobilevd.core.Runtimes;
import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import java.nio.file.Files;
import java.nio.file.StandardCopyOption;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.List;
import java.util.Queue;
import java.util.Random;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.function.Consumer;

/**
 * What the main screen shows, and the work behind it. It belongs to the process: a screen that is turned or closed
 * takes nothing with it. Picture, seed, model and the last clip are files, and outlive the process too.
 *
 * <p>Everything is called on the main thread; the work is done on one other, one job after the other.
 */
final class Studio {
    /** The job that the screen shows and that can be cancelled. */
    enum Work {
        NONE,
        INSTALLING,
        RUNNING,
        SAVING
    }

    /** How far a component is in the current run. */
    enum Phase {
        WAITING,
        LOADING,
        RUNNING,
        DONE,
        FAILED
    }

    /**
     * A line of the report.
     *
     * @param since uptime at which it began, ms
     * @param ms of the run; once it is done
     */
    record Row(String component, Phase phase, Backend backend, long since, double ms) {}

    /**
     * Something to tell. A person closes it, or the next job does.
     *
     * @param offersCpu whether to offer going on without the NPU
     */
    record Message(Words text, boolean isError, boolean offersCpu) {
        static Message notice(Words text) {
            return new Message(text, false, false);
        }
    }

    private static final int NO_MORE_THAN_A_SEED = 1_000_000;

    private final Context context;
    private final Device device;
    private final SharedPreferences settings;
    private final ArtifactStore store;
    private final RunTrace trace;
    private final File pictureFile;
    private final File clipFile;
    private final Handler main = new Handler(Looper.getMainLooper());
    private final ExecutorService worker = Executors.newSingleThreadExecutor();
    private Gallery.Encoder encoder = new Mp4();
    private final Queue<Uri> waiting = new ArrayDeque<>();
    private Runnable watcher = () -> {};

    private List<ArtifactStore.Installed> models = List.of();
    private String model;
    private String seed;
    private boolean cpuOnly;
    private Bitmap picture;
    private Result result;
    private Message message;
    private Work work = Work.NONE;
    private Cancellation cancellation = new Cancellation();
    private List<Row> rows = List.of();
    private double fraction;
    private long begun;
    private String installing;

    Studio(Context context, Device device) {
        this.context = context;
        this.device = device;
        settings = Settings.of(context);
        store = device.store();
        trace = device.trace();
        pictureFile = new File(context.getNoBackupFilesDir(), "picture");
        clipFile = new File(context.getNoBackupFilesDir(), "clip");
        model = settings.getString(Settings.MODEL, null);
        seed = settings.getString(Settings.SEED, "1");
        cpuOnly = settings.getBoolean(Settings.CPU_ONLY, false);
        worker.execute(this::restore);
        refreshModels();
        message = previousEnd();
    }

    // What the screen shows.

    /** Be told of every change, on the main thread; by one screen at a time. */
    void watch(Runnable watcher) {
        this.watcher = watcher;
    }

    List<ArtifactStore.Installed> models() {
        return models;
    }

    /** The chosen one; null if none is installed. */
    ArtifactStore.Installed model() {
        for (ArtifactStore.Installed installed : models) {
            if (installed.name().equals(model)) {
                return installed;
            }
        }
        return null;
    }

    /** The chosen model's manifest; null if there is none, or if it cannot be read. */
    Manifest manifest() {
        ArtifactStore.Installed installed = model();
        return installed == null || installed.artifact() == null ? null : installed.artifact().manifest();
    }

    String seed() {
        return seed;
    }

    boolean cpuOnly() {
        return cpuOnly;
    }

    Bitmap picture() {
        return picture;
    }

    /** The last clip; null while another is made, or for a new picture. */
    Result result() {
        return result;
    }

    Message message() {
        return message;
    }

    Work work() {
        return work;
    }

    boolean isCancelling() {
        return work != Work.NONE && cancellation.isCancelled();
    }

    /** Lines of the current run, or of one that did not end. */
    List<Row> rows() {
        return rows;
    }

    /** How much of the current job is done, in [0, 1]. */
    double fraction() {
        return fraction;
    }

    /** Milliseconds since the current job began. */
    long elapsed() {
        return SystemClock.uptimeMillis() - begun;
    }

    /** Name of the model that is being installed; null until it is known. */
    String installing() {
        return installing;
    }

    /** Whether another picture may be chosen now. */
    boolean canPick() {
        return work == Work.NONE || work == Work.INSTALLING;
    }

    boolean canRun() {
        return work == Work.NONE && picture != null && manifest() != null;
    }

    /** Why the chosen model will not run on the NPU; null if that will be tried. */
    Words whyNotNpu() {
        if (cpuOnly) {
            return Words.of(R.string.asked_cpu);
        }
        if (!device.hasNpuLibraries()) {
            return Words.of(new MobileVdException(Problem.NPU_NOT_IN_APP, Device.PLUGIN));
        }
        Manifest manifest = manifest();
        if (manifest != null && manifest.components().stream().allMatch(component -> component.npu().isEmpty())) {
            return Words.of(new MobileVdException(Problem.NPU_NO_BINARY, model));
        }
        return null;
    }

    // What the person does.

    void choose(String name) {
        select(name);
        forgetClip();
        changed();
    }

    private void select(String name) {
        model = name;
        keep(Settings.MODEL, name);
    }

    void setSeed(String text) {
        if (!text.equals(seed)) {
            seed = text;
            keep(Settings.SEED, text);
        }
    }

    void throwDice() {
        setSeed(String.valueOf(new Random().nextInt(NO_MORE_THAN_A_SEED)));
        changed();
    }

    void setCpuOnly(boolean only) {
        cpuOnly = only;
        settings.edit().putBoolean(Settings.CPU_ONLY, only).apply();
        changed();
    }

    void closeMessage() {
        message = null;
        installWaiting();
        changed();
    }

    void say(Words text) {
        say(new Message(text, true, false));
    }

    private void say(Message said) {
        message = said;
        changed();
    }

    /** Take a picture that another app holds; not while a clip is made, which it would take from the screen. */
    void usePicture(Uri uri) {
        if (work == Work.RUNNING) {
            say(Message.notice(Words.of(R.string.picture_refused)));
            return;
        }
        ContentResolver resolver = context.getContentResolver();
        worker.execute(
                () -> {
                    File incoming = new File(pictureFile.getPath() + ".partial");
                    try {
                        try (InputStream in = open(resolver, uri);
                                OutputStream out = Files.newOutputStream(incoming.toPath())) {
                            copy(in, out);
                        }
                        Bitmap preview = Pictures.preview(incoming);
                        Files.move(incoming.toPath(), pictureFile.toPath(), StandardCopyOption.REPLACE_EXISTING);
                        post(
                                () -> {
                                    picture = preview;
                                    message = null;
                                    if (work != Work.RUNNING) { // else it began meanwhile, and is of this picture
                                        forgetClip();
                                    }
                                });
                    } catch (IOException | RuntimeException | OutOfMemoryError error) {
                        // The other app's provider may throw whatever it likes.
                        incoming.delete();
                        fail(Words.of(R.string.not_a_picture, reason(error)));
                    }
                });
    }

    /** Make the clip. */
    void run() {
        if (!canRun()) {
            return;
        }
        long number;
        try {
            number = Noise.parseSeed(seed);
        } catch (MobileVdException problem) {
            say(Words.of(problem));
            return;
        }
        Runtimes.Asked asked = cpuOnly ? Runtimes.Asked.CPU : Runtimes.Asked.AUTO;
        Artifact artifact = model().artifact();
        List<Row> planned = new ArrayList<>();
        for (Manifest.Component component : artifact.manifest().components()) {
            planned.add(new Row(component.name(), Phase.WAITING, null, 0, 0));
        }
        forgetClip();
        rows = List.copyOf(planned);
        begin(Work.RUNNING, cancel -> make(artifact, number, asked, cancel));
    }

    private void make(Artifact artifact, long number, Runtimes.Asked asked, Cancellation cancel)
            throws IOException, MobileVdException {
        float[] image = Pictures.prepare(pictureFile, artifact.manifest().pipeline());
        cancel.check();
        Pipeline pipeline = new Pipeline(artifact, device.runtimes(), device.memory(), trace);
        Clip clip = pipeline.generate(image, number, asked, new Report(), cancel);
        Result made = Result.of(clip, number, elapsed());
        // Before it is kept: a full storage must not take it away.
        post(() -> result = made);
        made.write(clipFile);
    }

    /** Install the .mvd file that another app holds; behind the current job, if there is one. */
    void install(Uri uri) {
        if (work != Work.NONE) {
            waiting.add(uri);
            say(Message.notice(Words.of(R.string.install_waits)));
            return;
        }
        ContentResolver resolver = context.getContentResolver();
        begin(
                Work.INSTALLING,
                cancel -> {
                    String name = modelName(resolver, uri);
                    install(name, open(resolver, uri), cancel);
                    List<ArtifactStore.Installed> list = store.list();
                    post(
                            () -> {
                                models = list;
                                message = Message.notice(Words.of(R.string.installed, name));
                                select(name);
                                rows = List.of(); // of a run that failed; a clip stays, though another model made it
                            });
                });
    }

    /** Go on with the next file that came during a job. An error is read first: the new job would take it away. */
    private void installWaiting() {
        if (work == Work.NONE && (message == null || !message.isError()) && !waiting.isEmpty()) {
            install(waiting.remove());
        }
    }

    /** Install from an .mvd file, which is closed. */
    private void install(String name, InputStream file, Cancellation cancel) throws IOException, MobileVdException {
        post(() -> installing = name);
        try (InputStream in = file) {
            store.installZip(in, name, new Hundredths(), cancel);
        }
    }

    void remove(String name) {
        worker.execute(
                () -> {
                    try {
                        store.delete(name);
                        post(() -> message = Message.notice(Words.of(R.string.removed, name)));
                    } catch (MobileVdException problem) {
                        fail(Words.of(problem));
                    }
                    refresh();
                });
    }

    /** Look again which models there are: adb may have brought one. What came in the APK is installed if it is not. */
    void refreshModels() {
        String version = String.valueOf(device.lastUpdate());
        if (work == Work.NONE && !version.equals(settings.getString(Settings.BUNDLED, null))) {
            begin(Work.INSTALLING, cancel -> installBundled(version, cancel));
        } else {
            worker.execute(this::refresh);
        }
    }

    /** Save the clip to the gallery, unless it is there, then go on with where it is. */
    void save(Consumer<Uri> then) {
        if (result == null || work != Work.NONE) {
            return;
        }
        if (result.saved() != null) {
            then.accept(Uri.parse(result.saved()));
            return;
        }
        Result clip = result;
        Gallery gallery = new Gallery(context.getContentResolver(), encoder);
        begin(
                Work.SAVING,
                cancel -> {
                    requireSpace(Mp4.mostBytes(clip));
                    Uri uri;
                    try {
                        uri = gallery.save(clip);
                    } catch (IOException | SecurityException | IllegalArgumentException error) {
                        requireSpace(Mp4.mostBytes(clip)); // something else may have filled it meanwhile
                        fail(Words.of(R.string.not_saved, reason(error)));
                        return;
                    }
                    Result saved = clip.savedAs(uri.toString());
                    saved.write(clipFile);
                    post(
                            () -> {
                                if (result == clip) {
                                    result = saved;
                                }
                                message = Message.notice(Words.of(R.string.saved));
                                then.accept(uri);
                            });
                });
    }

    private void requireSpace(long bytes) throws MobileVdException {
        long free = device.freeBytes();
        if (free < bytes) {
            throw new MobileVdException(Problem.NO_SPACE, new ByteSize(bytes), new ByteSize(free));
        }
    }

    /** Stop the current job as soon as it can stop. */
    void cancel() {
        cancellation.cancel();
        changed();
    }

    /** Do something else on the thread that has all of the work, behind what is being done. */
    void afterwards(Runnable job) {
        worker.execute(job);
    }

    /** Tests encode for themselves: the JVM has no encoder. */
    void encodeWith(Gallery.Encoder other) {
        encoder = other;
    }

    /** Tests that look at pictures put in what repeats. */
    void setTimes(double ms) {
        List<Row> set = new ArrayList<>();
        for (Row row : rows) {
            set.add(new Row(row.component(), row.phase(), row.backend(), row.since(), row.ms() > 0 ? ms : 0));
        }
        rows = List.copyOf(set);
        changed();
    }

    // The work.

    private interface Job {
        void run(Cancellation cancel) throws IOException, MobileVdException;
    }

    private void begin(Work kind, Job job) {
        Cancellation cancel = new Cancellation();
        work = kind;
        cancellation = cancel;
        message = null;
        fraction = 0;
        begun = SystemClock.uptimeMillis();
        changed();
        worker.execute(
                () -> {
                    try {
                        job.run(cancel);
                    } catch (MobileVdException problem) {
                        if (problem.problem() != Problem.CANCELLED) {
                            fail(Words.of(problem));
                        }
                    } catch (IOException | RuntimeException | OutOfMemoryError | LinkageError error) {
                        fail(Words.of(R.string.failed, reason(error)));
                    } finally {
                        post(this::ended);
                    }
                });
    }

    private void ended() {
        work = Work.NONE;
        installing = null;
        List<Row> left = new ArrayList<>();
        if (result == null) {
            for (Row row : rows) {
                boolean open = row.phase() == Phase.LOADING || row.phase() == Phase.RUNNING;
                left.add(open ? new Row(row.component(), Phase.FAILED, row.backend(), 0, 0) : row);
            }
        }
        rows = List.copyOf(left);
        installWaiting();
    }

    /** Turns the pipeline's progress into lines. */
    private final class Report implements Pipeline.Listener {
        @Override
        public void at(
                String component, int index, int count, Backend backend, Pipeline.Stage stage, int call,
                double done) {
            if (stage == Pipeline.Stage.CLOSE) {
                return;
            }
            Phase phase = stage == Pipeline.Stage.LOAD ? Phase.LOADING : Phase.RUNNING;
            Row row = new Row(component, phase, backend, SystemClock.uptimeMillis(), 0);
            post(
                    () -> {
                        fraction = done;
                        set(row);
                    });
        }

        @Override
        public void finished(ComponentRun run) {
            Row row = new Row(run.component(), Phase.DONE, run.backend(), 0, run.ms().get(0));
            post(() -> set(row));
        }

        private void set(Row row) {
            List<Row> next = new ArrayList<>();
            rows.forEach(old -> next.add(old.component().equals(row.component()) ? row : old));
            rows = List.copyOf(next);
        }
    }

    /** Tells the screen of every hundredth; there are thousands of calls, which would flood its thread. */
    private final class Hundredths implements Progress {
        private long last;

        @Override
        public void at(long done, long total) {
            long now = done * 100 / Math.max(total, 1);
            if (now > last) {
                last = now;
                post(() -> fraction = now / 100.0);
            }
        }
    }

    private void restore() {
        Bitmap preview = null;
        Result clip = null;
        try {
            preview = pictureFile.exists() ? Pictures.preview(pictureFile) : null;
            clip = clipFile.exists() ? Result.read(clipFile) : null;
        } catch (IOException error) {
            // It was for comfort; the person chooses again.
        }
        Bitmap restoredPicture = preview;
        Result restoredClip = clip;
        post(
                () -> {
                    picture = restoredPicture;
                    result = restoredClip;
                });
    }

    /** Install what came in the APK, once for each version of it. */
    private void installBundled(String version, Cancellation cancel) throws IOException, MobileVdException {
        try {
            String[] bundled = context.getAssets().list("artifacts");
            for (String file : bundled == null ? new String[0] : bundled) {
                String name = file.substring(0, file.length() - ".mvd".length());
                install(name, context.getAssets().open("artifacts/" + file), cancel);
            }
            keep(Settings.BUNDLED, version);
        } finally {
            refresh();
        }
    }

    private void refresh() {
        try {
            List<ArtifactStore.Installed> list = store.list();
            post(
                    () -> {
                        models = list;
                        if (model() == null) {
                            model = list.isEmpty() ? null : list.get(0).name();
                        }
                    });
        } catch (MobileVdException problem) {
            fail(Words.of(problem));
        }
    }

    /** What the process before this one was doing when it ended, if it was in the middle of something. */
    private Message previousEnd() {
        RunTrace.Step step = trace.takePrevious();
        if (device.endedInStart()) {
            return new Message(Words.of(R.string.ended_in_start), true, true);
        }
        if (step == null) {
            return null;
        }
        boolean onNpu = step.backend().equals(Backend.NPU.id());
        Words text =
                Words.of(
                        R.string.ended_in_run, Words.component(step.component()),
                        Words.of(onNpu ? R.string.npu : R.string.cpu), step.artifact(), Words.stage(step.stage()));
        return new Message(text, true, onNpu);
    }

    private void forgetClip() {
        result = null;
        rows = List.of();
        worker.execute(clipFile::delete);
    }

    private static InputStream open(ContentResolver resolver, Uri uri) throws IOException {
        // A file: address could name this app's own files.
        if (!ContentResolver.SCHEME_CONTENT.equals(uri.getScheme())) {
            throw new IOException(String.valueOf(uri));
        }
        InputStream in = resolver.openInputStream(uri);
        if (in == null) {
            throw new IOException(uri.toString());
        }
        return in;
    }

    /** The file's name without its ending, with nothing in it that an artifact's name may not have. */
    private static String modelName(ContentResolver resolver, Uri uri) {
        String name = null;
        String[] columns = {OpenableColumns.DISPLAY_NAME};
        try (Cursor cursor = resolver.query(uri, columns, null, null, null)) {
            if (cursor != null && cursor.moveToFirst()) {
                name = cursor.getString(0);
            }
        }
        name = name == null ? uri.getLastPathSegment() : name;
        name = name == null ? "" : name.replaceFirst("(?i)\\.(mvd|zip)$", "");
        name = name.replaceAll("[^A-Za-z0-9._-]+", "-").replaceFirst("^[^A-Za-z0-9]+", "");
        return name.isEmpty() ? "model" : name;
    }

    private static void copy(InputStream in, OutputStream out) throws IOException {
        byte[] buffer = new byte[1 << 16];
        for (int count; (count = in.read(buffer)) >= 0; ) {
            out.write(buffer, 0, count);
        }
    }

    private static String reason(Throwable error) {
        return error.getMessage() == null ? error.toString() : error.getMessage();
    }

    private void keep(String key, String value) {
        settings.edit().putString(key, value).apply();
    }

    private void fail(Words text) {
        post(() -> message = new Message(text, true, false));
    }

    private void post(Runnable change) {
        main.post(
                () -> {
                    change.run();
                    changed();
                });
    }

    private void changed() {
        watcher.run();
    }
}
