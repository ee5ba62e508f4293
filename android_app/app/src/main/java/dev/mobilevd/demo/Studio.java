package dev.mobilevd.demo;

import android.content.Context;
import android.graphics.Bitmap;
import android.net.Uri;
import android.os.Build;
import android.os.SystemClock;
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
import java.io.IOException;
import java.io.InputStream;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.Queue;
import java.util.Random;
import java.util.concurrent.RejectedExecutionException;
import java.util.function.Consumer;
import java.util.function.UnaryOperator;

/**
 * What a person can do on the main screen. It belongs to the process, so work continues when a screen is turned or
 * closed.
 *
 * <p>All methods are called on the main thread. They change {@link State} and give work to {@link Worker}.
 */
final class Studio {
    private static final int RANDOM_SEEDS = 1_000_000;
    /** How long a notice is shown, ms. */
    private static final long NOTICE_MS = 6000;
    private static final int MOST_OFFERS = 8;
    /** A picture that takes longer is worth a message, ms. */
    private static final long SLOW_MS = 1000;

    private final Context context;
    private final Device device;
    private final Settings settings;
    private final KeptFiles files;
    private final Incoming incoming;
    private final ArtifactStore store;
    private final RunTrace trace;
    private final Worker worker = new Worker();
    private final Queue<Incoming.Offer> waiting = new ArrayDeque<>();
    private Gallery.Encoder encoder = new Mp4();
    private Runnable watcher = () -> {};
    private Cancellation cancellation = new Cancellation();
    private Cancellation reading;
    private RunService service;
    private boolean mayRunInBackground;
    private Words stopped;
    private State state;

    Studio(Context context, Device device) {
        this.context = context;
        this.device = device;
        settings = new Settings(context);
        files = new KeptFiles(context);
        incoming = new Incoming(context.getContentResolver());
        store = device.store();
        trace = device.trace();
        state =
                new State(
                        List.of(), settings.model(), settings.seed(), settings.cpuOnly(), null, null, false, List.of(),
                        null, List.of(), State.Job.NONE);
        worker.run(this::restore);
        refresh();
        change(now -> now.withMessage(previousEnd()));
    }

    State state() {
        return state;
    }

    /** Call {@code watcher} on the main thread after every change. It replaces the previous one. */
    void watch(Runnable watcher) {
        this.watcher = watcher;
    }

    /** Why the chosen model will not run on the NPU; null if the NPU will be tried. */
    Words whyNotNpu() {
        if (state.cpuOnly()) {
            return Words.of(R.string.asked_cpu);
        }
        if (!device.hasNpuLibraries()) {
            return Words.of(new MobileVdException(Problem.NPU_NOT_IN_APP));
        }
        Manifest manifest = state.manifest();
        if (manifest != null && manifest.components().stream().allMatch(component -> component.npu().isEmpty())) {
            return Words.of(new MobileVdException(Problem.NPU_NO_BINARY, state.modelName()));
        }
        return null;
    }

    // Choices.

    void choose(String name) {
        settings.setModel(name);
        change(now -> now.withModelName(name).withRows(List.of()));
    }

    void setSeed(String text) {
        if (!text.equals(state.seed())) {
            settings.setSeed(text);
            state = state.withSeed(text); // the field shows it already
        }
    }

    void throwDice() {
        setSeed(String.valueOf(new Random().nextInt(RANDOM_SEEDS)));
        watcher.run();
    }

    void setCpuOnly(boolean only) {
        settings.setCpuOnly(only);
        change(now -> now.withCpuOnly(only));
    }

    void closeMessage() {
        change(now -> now.withMessage(null));
        installWaiting();
    }

    void say(Words text) {
        change(now -> now.withMessage(State.Message.error(text)));
    }

    /** Use a picture that another app provides. During a run it is refused, because it would remove the clip. */
    void usePicture(Uri uri) {
        if (state.work() == State.Work.RUNNING) {
            change(now -> now.withMessage(State.Message.notice(Words.of(R.string.picture_refused))));
            return;
        }
        cancelReading();
        Cancellation cancel = new Cancellation();
        reading = cancel;
        worker.postLater(() -> sayReading(cancel), SLOW_MS);
        try {
            incoming.run(() -> read(uri, cancel));
        } catch (RejectedExecutionException error) {
            failReading(cancel, Words.of(R.string.no_answer));
        }
    }

    private void read(Uri uri, Cancellation cancel) {
        try (InputStream in = incoming.open(uri, cancel)) {
            cancel.enter(() -> close(in));
            Bitmap preview = files.replacePicture(in, cancel);
            cancel.leave();
            worker.post(() -> showPicture(preview));
        } catch (MobileVdException problem) {
            failReading(cancel, Words.of(problem));
        } catch (IOException | RuntimeException | OutOfMemoryError error) {
            failReading(cancel, Words.of(R.string.not_a_picture, Words.reason(error)));
        }
    }

    private void sayReading(Cancellation cancel) {
        if (reading == cancel) {
            change(
                    now ->
                            now.withMessage(
                                    new State.Message(
                                            Words.of(R.string.reading_picture), false,
                                            State.Action.CANCEL_READING)));
        }
    }

    private void failReading(Cancellation cancel, Words text) {
        worker.post(
                () -> {
                    if (reading == cancel) {
                        reading = null;
                        say(text);
                    }
                });
    }

    /** Stop reading a picture. The message about it goes too. */
    void cancelReading() {
        if (reading != null) {
            reading.cancel();
            reading = null;
        }
        if (state.message() != null && state.message().action() == State.Action.CANCEL_READING) {
            change(now -> now.withMessage(null));
        }
    }

    boolean isReading() {
        return reading != null;
    }

    private void showPicture(Bitmap preview) {
        reading = null;
        boolean isRunning = state.work() == State.Work.RUNNING; // it began meanwhile, with this picture
        change(
                now ->
                        now.withPicture(preview)
                                .withClipShown(false)
                                .withRows(isRunning ? now.rows() : List.of())
                                .withMessage(null));
    }

    /** Show the last clip again after a new picture. */
    void showClip() {
        change(now -> now.withClipShown(true).withRows(List.of()));
    }

    // Running.

    void run() {
        if (!state.canRun()) {
            return;
        }
        long seed;
        try {
            seed = Noise.parseSeed(state.seed());
        } catch (MobileVdException problem) {
            say(Words.of(problem));
            return;
        }
        Runtimes.Asked asked = state.cpuOnly() ? Runtimes.Asked.CPU : Runtimes.Asked.AUTO;
        Artifact artifact = state.model().artifact();
        List<State.Row> planned = new ArrayList<>();
        artifact.manifest().components().forEach(component -> planned.add(State.Row.waiting(component.name())));
        change(now -> now.withRows(planned));
        mayRunInBackground = device.startRunService();
        Map<String, Double> times = state.result() == null ? Map.of() : state.result().times();
        begin(State.Work.RUNNING, cancel -> generate(artifact, seed, asked, times, cancel));
    }

    private void generate(
            Artifact artifact, long seed, Runtimes.Asked asked, Map<String, Double> times, Cancellation cancel)
            throws IOException, MobileVdException {
        long begun = SystemClock.uptimeMillis();
        float[] image = Pictures.prepare(files.picture(), artifact.manifest().pipeline());
        cancel.check();
        Pipeline pipeline = new Pipeline(artifact, device.runtimes(), device.memory(), trace, times);
        Clip clip = pipeline.generate(image, seed, asked, new RowUpdates(), cancel);
        Result made = Result.of(clip, seed, SystemClock.uptimeMillis() - begun);
        // Show it before it is written: a full storage must not remove it from the screen.
        post(now -> now.withResult(made));
        files.replaceClip(made);
    }

    /** Cancel the current job. It ends at its next check. */
    void cancel() {
        cancellation.cancel();
        change(now -> now.withJob(now.job().cancelling()));
    }

    /** The service for the background has started. If the run is over, it stops at once. */
    void attach(RunService started) {
        service = started;
        if (state.work() != State.Work.RUNNING) {
            started.stopSelf();
        }
    }

    void detach(RunService ended) {
        if (service == ended) {
            service = null;
        }
    }

    /** The app is not visible any more. A run without the service would be frozen, so it is stopped. */
    void leaveScreen() {
        if (!mayRunInBackground) {
            stopInBackground();
        }
    }

    /** Stop the run because it must not go on in the background, and say so. */
    void stopInBackground() {
        if (state.work() == State.Work.RUNNING && !state.job().isCancelling()) {
            stopped = Words.of(R.string.stopped_in_background);
            cancel();
        }
    }

    /** Converts the pipeline's progress to rows. */
    private final class RowUpdates implements Pipeline.Listener {
        @Override
        public void at(
                String component, int index, int count, Backend backend, Pipeline.Stage stage, int call,
                double fraction) {
            if (stage == Pipeline.Stage.CLOSE) {
                return;
            }
            State.Phase phase = stage == Pipeline.Stage.LOAD ? State.Phase.LOADING : State.Phase.RUNNING;
            State.Row row = new State.Row(component, phase, backend, SystemClock.uptimeMillis(), 0);
            post(now -> now.withRow(row).withJob(now.job().withFraction(fraction)));
        }

        @Override
        public void finished(ComponentRun run) {
            State.Row row = new State.Row(run.component(), State.Phase.DONE, run.backend(), 0, run.ms().get(0));
            post(now -> now.withRow(row));
        }
    }

    // Models.

    /** Ask whether to install the .mvd file that another app provides. The file is not read before the answer. */
    void offer(Uri uri) {
        if (state.offers().size() >= MOST_OFFERS) {
            return;
        }
        try {
            incoming.run(
                    () -> {
                        try {
                            Incoming.Offer offer = incoming.describe(uri, new Cancellation());
                            post(now -> now.withOffer(offer));
                        } catch (MobileVdException | IOException | RuntimeException error) {
                            fail(Words.of(R.string.failed, Words.reason(error)));
                        }
                    });
        } catch (RejectedExecutionException error) {
            say(Words.of(R.string.no_answer));
        }
    }

    void decline(Incoming.Offer offer) {
        change(now -> now.withoutOffer(offer));
    }

    /** Install an offered file, after the current job. */
    void install(Incoming.Offer offer) {
        change(now -> now.withoutOffer(offer));
        if (!state.isIdle()) {
            waiting.add(offer);
            change(now -> now.withMessage(State.Message.notice(Words.of(R.string.install_waits))));
            return;
        }
        begin(
                State.Work.INSTALLING,
                cancel -> {
                    String name = offer.modelName();
                    install(name, incoming.open(offer.uri(), cancel), cancel);
                    List<ArtifactStore.Installed> list = store.list();
                    settings.setModel(name);
                    post(
                            now ->
                                    now.withModels(list)
                                            .withModelName(name)
                                            .withRows(List.of()) // of a failed run; a clip of another model stays
                                            .withMessage(State.Message.notice(Words.of(R.string.installed, name))));
                });
    }

    /** Install the next file that arrived during a job. An error message comes first: the job would remove it. */
    private void installWaiting() {
        boolean hasError = state.message() != null && state.message().isError();
        if (state.isIdle() && !hasError && !waiting.isEmpty()) {
            install(waiting.remove());
        }
    }

    /** Install an .mvd file and close it. */
    private void install(String name, InputStream file, Cancellation cancel) throws IOException, MobileVdException {
        post(now -> now.withJob(now.job().withInstalling(name)));
        cancel.enter(() -> close(file));
        try (InputStream in = file) {
            store.installZip(in, name, new PercentUpdates(), cancel);
        } finally {
            cancel.leave();
        }
    }

    /** Close a stream of another app, which ends a read that waits for it. */
    private static void close(InputStream in) {
        try {
            in.close();
        } catch (IOException | RuntimeException error) {
            // It is not used any more.
        }
    }

    void remove(String name) {
        if (state.models().stream().anyMatch(model -> model.name().equals(name) && model.problem() != null)) {
            settings.setBundledVersion(null); // if the APK has it, the next refresh installs it again
        }
        worker.run(
                () -> {
                    try {
                        store.delete(name);
                        post(now -> now.withMessage(State.Message.notice(Words.of(R.string.removed, name))));
                    } catch (MobileVdException problem) {
                        fail(Words.of(problem));
                    }
                    listModels();
                    worker.post(this::refresh);
                });
    }

    /**
     * Notice what changed while the app was not visible: adb may have copied a model, and another app may have deleted
     * the saved clip. The models of the APK are installed once for each version of it.
     */
    void refresh() {
        checkSaved();
        String version = String.valueOf(device.lastUpdate());
        if (state.isIdle() && !version.equals(settings.bundledVersion())) {
            begin(State.Work.INSTALLING, cancel -> installBundled(version, cancel));
        } else {
            worker.run(this::listModels);
        }
    }

    private void installBundled(String version, Cancellation cancel) throws IOException, MobileVdException {
        try {
            String[] bundled = context.getAssets().list("artifacts");
            for (String file : bundled == null ? new String[0] : bundled) {
                String name = file.substring(0, file.length() - ".mvd".length());
                install(name, context.getAssets().open("artifacts/" + file), cancel);
            }
            settings.setBundledVersion(version);
        } finally {
            listModels();
        }
    }

    private void listModels() {
        try {
            List<ArtifactStore.Installed> list = store.list();
            post(
                    old -> {
                        State now = old.withModels(list);
                        String first = list.isEmpty() ? null : list.get(0).name();
                        return now.model() == null ? now.withModelName(first) : now;
                    });
        } catch (MobileVdException problem) {
            fail(Words.of(problem));
        }
    }

    /** Updates the progress at each percent; updates at each of thousands of calls would block the main thread. */
    private final class PercentUpdates implements Progress {
        private long last;

        @Override
        public void at(long done, long total) {
            long percent = done * 100 / Math.max(total, 1);
            if (percent > last) {
                last = percent;
                post(now -> now.withJob(now.job().withFraction(percent / 100.0)));
            }
        }
    }

    // Saving.

    /** Save the clip to the gallery unless it is there, then call {@code then} with its address. */
    void save(Consumer<Uri> then) {
        Result clip = state.clip();
        if (clip == null || !state.isIdle()) {
            return;
        }
        Gallery gallery = new Gallery(context.getContentResolver(), encoder);
        begin(
                State.Work.SAVING,
                cancel -> {
                    if (clip.saved() != null && gallery.contains(Uri.parse(clip.saved()))) {
                        worker.post(() -> then.accept(Uri.parse(clip.saved())));
                        return;
                    }
                    requireSpace(Mp4.mostBytes(clip));
                    Uri uri;
                    try {
                        uri = gallery.save(clip, cancel);
                    } catch (IOException | SecurityException | IllegalArgumentException error) {
                        requireSpace(Mp4.mostBytes(clip)); // the storage may have filled meanwhile
                        fail(Words.of(R.string.not_saved, Words.reason(error)));
                        return;
                    }
                    replace(clip, clip.savedAs(uri.toString()));
                    // Up to Android 9 the system chooses the folder.
                    boolean known = Build.VERSION.SDK_INT >= 29;
                    Words said = Words.of(known ? R.string.saved : R.string.saved_somewhere);
                    post(now -> now.withMessage(State.Message.notice(said)));
                    worker.post(() -> then.accept(uri));
                });
    }

    /** Make a clip savable again if it was deleted in the gallery. */
    private void checkSaved() {
        Result clip = state.result();
        if (clip == null || clip.saved() == null) {
            return;
        }
        Gallery gallery = new Gallery(context.getContentResolver(), encoder);
        worker.run(
                () -> {
                    if (!gallery.contains(Uri.parse(clip.saved()))) {
                        try {
                            replace(clip, clip.savedAs(null));
                        } catch (IOException error) {
                            fail(Words.of(R.string.failed, Words.reason(error)));
                        }
                    }
                });
    }

    /** Replace the last clip by the same one with another address, unless there is a newer one. */
    private void replace(Result clip, Result changed) throws IOException {
        files.replaceClip(changed);
        post(now -> now.result() == clip ? now.withResult(changed).withClipShown(now.showsClip()) : now);
    }

    private void requireSpace(long bytes) throws MobileVdException {
        long free = device.freeBytes();
        if (free < bytes) {
            throw new MobileVdException(Problem.NO_SPACE, new ByteSize(bytes), new ByteSize(free));
        }
    }

    /** Tests replace the encoder, because the JVM has none. */
    void encodeWith(Gallery.Encoder other) {
        encoder = other;
    }

    // Work and state.

    /** Run a task after the current job, on the same thread. */
    void afterwards(Runnable task) {
        worker.run(task);
    }

    private void begin(State.Work work, Worker.Task task) {
        cancellation = new Cancellation();
        change(now -> now.withMessage(null).withJob(State.Job.of(work)));
        worker.run(task, cancellation, this::fail, () -> worker.post(this::ended));
    }

    private void ended() {
        change(State::withJobEnded);
        if (service != null) {
            service.stopSelf();
        }
        if (stopped != null) {
            say(stopped);
            stopped = null;
        }
        installWaiting();
    }

    private void restore() {
        files.sweep();
        try {
            store.sweep();
        } catch (MobileVdException problem) {
            fail(Words.of(problem));
        }
        Bitmap preview = files.preview();
        Result clip = files.clip();
        boolean showsClip = clip != null && !files.isPictureNewer();
        post(now -> now.withPicture(preview).withResult(clip).withClipShown(showsClip));
    }

    /** Says in which step the previous process ended; null if it was not running anything. */
    private State.Message previousEnd() {
        RunTrace.Step step = trace.takePrevious();
        if (device.endedInStart()) {
            return new State.Message(Words.of(R.string.ended_in_start), true, State.Action.USE_CPU);
        }
        if (step == null) {
            return null;
        }
        boolean onNpu = step.backend().equals(Backend.NPU.id());
        Words text =
                Words.of(
                        R.string.ended_in_run, Words.component(step.component()),
                        Words.of(onNpu ? R.string.npu : R.string.cpu), step.artifact(), Words.stage(step.stage()));
        return new State.Message(text, true, onNpu ? State.Action.USE_CPU : State.Action.NONE);
    }

    private void fail(Words text) {
        post(now -> now.withMessage(State.Message.error(text)));
    }

    /** Change the state from the worker's thread. */
    private void post(UnaryOperator<State> change) {
        worker.post(() -> change(change));
    }

    /** Change the state; on the main thread. */
    void change(UnaryOperator<State> change) {
        State.Message before = state.message();
        state = change.apply(state);
        State.Message message = state.message();
        if (message != before && message != null && message.disappears()) {
            worker.postLater(() -> removeNotice(message), NOTICE_MS);
        }
        watcher.run();
    }

    private void removeNotice(State.Message notice) {
        if (state.message() == notice) {
            closeMessage();
        }
    }
}
