package dev.mobilevd.demo;

import static org.junit.Assert.assertTrue;
import static org.robolectric.Shadows.shadowOf;

import android.app.Activity;
import android.app.ActivityManager;
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
import java.util.HexFormat;
import java.util.concurrent.TimeUnit;
import java.util.function.BooleanSupplier;
import java.util.function.LongSupplier;
import java.util.zip.ZipEntry;
import java.util.zip.ZipOutputStream;
import org.robolectric.Robolectric;
import org.robolectric.RuntimeEnvironment;
import org.robolectric.android.controller.ActivityController;

/** What the tests do to the app, as a person or the system would. */
final class Phone {
    static final Path ROOT = Path.of(System.getProperty("mobilevd.root"));
    private static final long PATIENCE_MS = 120_000;

    final DemoApp app = (DemoApp) RuntimeEnvironment.getApplication();
    ActivityController<MainActivity> controller;

    /** A phone on which the app is installed, was started, and has unpacked its model. */
    Phone() {
        memory(8L << 30);
        until("the model is unpacked", () -> studio().model() != null && studio().work() == Studio.Work.NONE);
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

    /** End the process in whatever it does, and start it again as it is in the shop. */
    void restart() {
        app.start(new Device(app));
    }

    MainActivity open() {
        return open(new Intent(Intent.ACTION_MAIN));
    }

    MainActivity open(Intent intent) {
        controller = Robolectric.buildActivity(MainActivity.class, intent).setup();
        until("the models are known", () -> studio().model() != null);
        return controller.get();
    }

    /** Open the app as after an installation; once the door is open it asks for free storage, and unpacks its model. */
    Door openFirst(LongSupplier freeBytes) throws MobileVdException {
        return openFirst(freeBytes, new Intent(Intent.ACTION_MAIN));
    }

    Door openFirst(LongSupplier freeBytes, Intent intent) throws MobileVdException {
        Settings.of(app).edit().clear().commit();
        for (ArtifactStore.Installed model : studio().models()) {
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

    /** Let the main thread do what waits for it. */
    void settle() {
        shadowOf(Looper.getMainLooper()).idle();
    }

    void until(String what, BooleanSupplier condition) {
        long end = System.nanoTime() + TimeUnit.MILLISECONDS.toNanos(PATIENCE_MS);
        settle();
        while (!condition.getAsBoolean()) {
            assertTrue("it did not happen: " + what, System.nanoTime() < end);
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
                        studio().rows().stream()
                                .anyMatch(
                                        row ->
                                                row.component().equals(component)
                                                        && row.phase() == Studio.Phase.LOADING));
    }

    /** Let the main thread do one thing after the other until that much of the job is done, and no more. */
    void untilDone(double fraction) {
        long end = System.nanoTime() + TimeUnit.MILLISECONDS.toNanos(PATIENCE_MS);
        while (studio().fraction() < fraction) {
            assertTrue("it came so far", System.nanoTime() < end);
            shadowOf(Looper.getMainLooper()).runOneTask();
        }
    }

    void untilIdle() {
        until("the work is done", () -> studio().work() == Studio.Work.NONE);
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
        return shows(R.id.message) ? text(R.id.message_text) : "";
    }

    boolean shows(int id) {
        return activity().findViewById(id).isShown();
    }

    /** A content address that gives these bytes, as a file manager's would. */
    Uri content(String name, byte[] bytes) {
        Uri uri = Uri.parse("content://files/" + name);
        shadowOf(app.getContentResolver()).registerInputStreamSupplier(uri, () -> new ByteArrayInputStream(bytes));
        return uri;
    }

    /** Where the chosen model lies. */
    Path modelFolder() {
        return studio().model().artifact().root();
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

    /** Give a model a manifest of a version that is not known yet. */
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
        until("the picture is shown", () -> studio().picture() != null);
    }

    /** The screen as a picture, between a status bar and a gesture bar; a clip stands at its middle. */
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

    /** The screen behind a dialog, as the system draws the two. */
    static Bitmap screenshot(Activity activity, Dialog dialog) {
        Bitmap screen = screenshot(activity);
        Canvas canvas = new Canvas(screen);
        canvas.drawColor(Color.argb(dialog.getWindow().getAttributes().dimAmount, 0, 0, 0));
        View decor = dialog.getWindow().getDecorView();
        float density = decor.getResources().getDisplayMetrics().density;
        // The width that the system offers first; a theme's least width is above it.
        decor.measure(
                View.MeasureSpec.makeMeasureSpec(Math.round(320 * density), View.MeasureSpec.AT_MOST),
                View.MeasureSpec.makeMeasureSpec(screen.getHeight(), View.MeasureSpec.AT_MOST));
        decor.layout(0, 0, decor.getMeasuredWidth(), decor.getMeasuredHeight());
        canvas.translate((screen.getWidth() - decor.getWidth()) / 2f, (screen.getHeight() - decor.getHeight()) / 2f);
        decor.draw(canvas);
        return screen;
    }
}
