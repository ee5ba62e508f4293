package dev.mobilevd.demo;

import static org.junit.Assert.assertTrue;
import static org.robolectric.Shadows.shadowOf;

import android.app.Activity;
import android.app.ActivityManager;
import android.app.AlertDialog;
import android.app.Dialog;
import android.content.Intent;
import android.graphics.Bitmap;
import android.graphics.Canvas;
import android.graphics.Color;
import android.graphics.Insets;
import android.graphics.drawable.AnimationDrawable;
import android.net.Uri;
import android.os.Looper;
import android.view.View;
import android.view.WindowInsets;
import android.widget.ImageView;
import android.widget.TextView;
import dev.mobilevd.core.ArtifactStore;
import dev.mobilevd.core.MobileVdException;
import dev.mobilevd.core.Runtimes;
import java.io.ByteArrayInputStream;
import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.MessageDigest;
import java.util.ArrayList;
import java.util.HexFormat;
import java.util.List;
import java.util.concurrent.TimeUnit;
import java.util.function.BooleanSupplier;
import java.util.function.LongSupplier;
import java.util.zip.ZipEntry;
import java.util.zip.ZipOutputStream;
import org.robolectric.Robolectric;
import org.robolectric.RuntimeEnvironment;
import org.robolectric.android.controller.ActivityController;
import org.robolectric.shadows.ShadowDialog;

/** Acts on the app like a person or the system. */
final class Phone {
    static final Path ROOT = Path.of(System.getProperty("mobilevd.root"));
    private static final long PATIENCE_MS = 120_000;

    final DemoApp app = (DemoApp) RuntimeEnvironment.getApplication();
    ActivityController<MainActivity> controller;

    /** A phone with the installed app, after its first start has unpacked the model. */
    Phone() {
        memory(8L << 30);
        until("the model is unpacked", () -> state().model() != null && state().work() == State.Work.NONE);
    }

    /** Set how much memory the system says is free. */
    void memory(long bytes) {
        ActivityManager.MemoryInfo info = new ActivityManager.MemoryInfo();
        info.availMem = bytes;
        info.totalMem = 12L << 30;
        shadowOf(app.getSystemService(ActivityManager.class)).setMemoryInfo(info);
    }

    /** End the process and start it again on a device that runs on {@code runtimes}. */
    void restart(Runtimes runtimes) {
        app.start(
                new Device(app) {
                    @Override
                    synchronized Runtimes runtimes() {
                        return runtimes;
                    }

                    @Override
                    boolean hasNpuLibraries() {
                        return runtimes.whyNoNpu() == null;
                    }
                });
    }

    /** End the process and start it again with so much free storage. */
    void restart(LongSupplier freeBytes) {
        app.start(
                new Device(app) {
                    @Override
                    long freeBytes() {
                        return freeBytes.getAsLong();
                    }
                });
    }

    /** End the process at any point and start it again. */
    void restart() {
        app.start(new Device(app));
    }

    MainActivity open() {
        return open(new Intent(Intent.ACTION_MAIN));
    }

    MainActivity open(Intent intent) {
        controller = Robolectric.buildActivity(MainActivity.class, intent).setup();
        until("the models are known", () -> state().model() != null);
        return controller.get();
    }

    /** Open the app for the first time. When the door is open, it reads the free storage and unpacks its model. */
    Door openFirst(LongSupplier freeBytes) throws MobileVdException {
        return openFirst(freeBytes, new Intent(Intent.ACTION_MAIN));
    }

    Door openFirst(LongSupplier freeBytes, Intent intent) throws MobileVdException {
        new Settings(app).clear();
        for (ArtifactStore.Installed model : state().models()) {
            app.device().store().delete(model.name());
        }
        Door door = new Door();
        restart(
                () -> {
                    door.pass();
                    return freeBytes.getAsLong();
                });
        controller = Robolectric.buildActivity(MainActivity.class, intent).setup();
        settle();
        return door;
    }

    MainActivity activity() {
        return controller.get();
    }

    Studio studio() {
        return app.studio();
    }

    State state() {
        return studio().state();
    }

    /** Replace the measured times, so that pictures are repeatable. */
    void setTimes(double ms) {
        List<State.Row> rows = new ArrayList<>();
        for (State.Row row : state().rows()) {
            double time = row.ms() > 0 ? ms : 0;
            rows.add(new State.Row(row.component(), row.phase(), row.backend(), row.since(), time));
        }
        studio().change(now -> now.withRows(rows));
    }

    /** Run all pending tasks of the main thread. */
    void settle() {
        shadowOf(Looper.getMainLooper()).idle();
    }

    void until(String what, BooleanSupplier condition) {
        long end = System.nanoTime() + TimeUnit.MILLISECONDS.toNanos(PATIENCE_MS);
        settle();
        while (!condition.getAsBoolean()) {
            assertTrue("did not happen: " + what, System.nanoTime() < end);
            try {
                Thread.sleep(5);
            } catch (InterruptedException error) {
                throw new IllegalStateException(error);
            }
            settle();
        }
    }

    /** Press the button and wait for the end. */
    void make() {
        click(R.id.go);
        untilIdle();
    }

    /** Wait for a component of the run to begin. */
    void untilLoading(String component) {
        until(
                component + " is being loaded",
                () ->
                        state().rows().stream()
                                .anyMatch(
                                        row ->
                                                row.component().equals(component)
                                                        && row.phase() == State.Phase.LOADING));
    }

    /** Run single tasks of the main thread until this fraction of the job is done. */
    void untilDone(double fraction) {
        long end = System.nanoTime() + TimeUnit.MILLISECONDS.toNanos(PATIENCE_MS);
        while (state().job().fraction() < fraction) {
            assertTrue("it came so far", System.nanoTime() < end);
            shadowOf(Looper.getMainLooper()).runOneTask();
        }
    }

    void untilIdle() {
        until("the work is done", () -> state().work() == State.Work.NONE);
    }

    void click(int id) {
        assertTrue("it can be clicked", activity().findViewById(id).performClick());
        settle();
    }

    String text(int id) {
        return ((TextView) activity().findViewById(id)).getText().toString();
    }

    /** The message on the screen; "" if there is none. */
    String message() {
        settle();
        return shows(R.id.message) ? text(R.id.message_text) : shows(R.id.snackbar) ? text(R.id.snackbar_text) : "";
    }

    boolean shows(int id) {
        return activity().findViewById(id).isShown();
    }

    /** A content address of these bytes, as of a file manager. */
    Uri content(String name, byte[] bytes) {
        Uri uri = Uri.parse("content://files/" + name);
        shadowOf(app.getContentResolver()).registerInputStreamSupplier(uri, () -> new ByteArrayInputStream(bytes));
        return uri;
    }

    /** Let another app open an .mvd file with this app, and confirm the installation. */
    void openModel(String name, byte[] bytes) {
        controller.newIntent(new Intent(Intent.ACTION_VIEW, content(name, bytes)));
        confirm();
    }

    /** Confirm the question whether to install. */
    void confirm() {
        until("the question is asked", () -> !state().offers().isEmpty());
        question().getButton(AlertDialog.BUTTON_POSITIVE).performClick();
        settle();
    }

    /** The latest dialog. */
    AlertDialog question() {
        return (AlertDialog) ShadowDialog.getLatestDialog();
    }

    /** The folder of the chosen model. */
    Path modelFolder() {
        return state().model().artifact().root();
    }

    /** The chosen model as an .mvd file. */
    byte[] mvd() throws IOException {
        Path artifact = modelFolder();
        ByteArrayOutputStream bytes = new ByteArrayOutputStream();
        try (ZipOutputStream zip = new ZipOutputStream(bytes);
                var files = Files.walk(artifact)) {
            zip.setLevel(1);
            zip.putNextEntry(new ZipEntry("manifest.json"));
            Files.copy(artifact.resolve("manifest.json"), zip);
            for (Path path : (Iterable<Path>) files.filter(Files::isRegularFile)::iterator) {
                String name = artifact.relativize(path).toString();
                if (!name.equals("manifest.json")) {
                    zip.putNextEntry(new ZipEntry(name));
                    Files.copy(path, zip);
                }
            }
        }
        return bytes.toByteArray();
    }

    /** Change a model's manifest to an unknown version. */
    void makeNewer(Path model) throws Exception {
        Path manifest = model.resolve("manifest.json");
        String text = Files.readString(manifest).replace("\"schema_version\": 1", "\"schema_version\": 2");
        Files.writeString(manifest, text);
        byte[] digest = MessageDigest.getInstance("SHA-256").digest(text.getBytes(StandardCharsets.UTF_8));
        Files.writeString(model.resolve("manifest.sha256"), HexFormat.of().formatHex(digest) + "  manifest.json\n");
    }

    /** The repository's demo picture. */
    Uri picture() throws IOException {
        return content("demo.png", Files.readAllBytes(ROOT.resolve("models/demo.png")));
    }

    /** Choose the demo picture through the system's picker. */
    void choosePicture() throws IOException {
        click(R.id.stage);
        shadowOf(activity())
                .receiveResult(
                        shadowOf(activity()).getNextStartedActivityForResult().intent,
                        Activity.RESULT_OK,
                        new Intent().setData(picture()));
        until("the picture is shown", () -> state().picture() != null);
    }

    /** The screen as a picture, with a status bar and a gesture bar. A clip is stopped at its middle. */
    static Bitmap screenshot(Activity activity) {
        ImageView picture = activity.findViewById(R.id.picture);
        if (picture != null && picture.getDrawable() instanceof AnimationDrawable clip) {
            clip.stop();
            clip.selectDrawable(clip.getNumberOfFrames() / 2);
        }
        View decor = activity.getWindow().getDecorView();
        float density = decor.getResources().getDisplayMetrics().density;
        WindowInsets bars =
                new WindowInsets.Builder()
                        .setInsets(
                                WindowInsets.Type.systemBars(),
                                Insets.of(0, Math.round(24 * density), 0, Math.round(24 * density)))
                        .build();
        decor.dispatchApplyWindowInsets(bars);
        decor.measure(
                View.MeasureSpec.makeMeasureSpec(decor.getWidth(), View.MeasureSpec.EXACTLY),
                View.MeasureSpec.makeMeasureSpec(decor.getHeight(), View.MeasureSpec.EXACTLY));
        decor.layout(0, 0, decor.getWidth(), decor.getHeight());
        Bitmap bitmap = Bitmap.createBitmap(decor.getWidth(), decor.getHeight(), Bitmap.Config.ARGB_8888);
        decor.draw(new Canvas(bitmap));
        return bitmap;
    }

    /** The screen with a dialog. */
    static Bitmap screenshot(Activity activity, Dialog dialog) {
        Bitmap screen = screenshot(activity);
        Canvas canvas = new Canvas(screen);
        canvas.drawColor(Color.argb(dialog.getWindow().getAttributes().dimAmount, 0, 0, 0));
        View decor = dialog.getWindow().getDecorView();
        float density = decor.getResources().getDisplayMetrics().density;
        // The system's preferred width; the theme's minimum is larger.
        decor.measure(
                View.MeasureSpec.makeMeasureSpec(Math.round(320 * density), View.MeasureSpec.AT_MOST),
                View.MeasureSpec.makeMeasureSpec(screen.getHeight(), View.MeasureSpec.AT_MOST));
        decor.layout(0, 0, decor.getMeasuredWidth(), decor.getMeasuredHeight());
        canvas.translate((screen.getWidth() - decor.getWidth()) / 2f, (screen.getHeight() - decor.getHeight()) / 2f);
        decor.draw(canvas);
        return screen;
    }
}
