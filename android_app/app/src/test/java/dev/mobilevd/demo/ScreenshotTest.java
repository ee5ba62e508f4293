package dev.mobilevd.demo;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertTrue;
import static org.robolectric.Shadows.shadowOf;

import android.app.Activity;
import android.app.Dialog;
import android.content.Intent;
import android.graphics.Bitmap;
import android.graphics.BitmapFactory;
import android.os.Looper;
import dev.mobilevd.core.Backend;
import java.io.File;
import java.io.FileOutputStream;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.TimeUnit;
import org.junit.Test;
import org.junit.runner.RunWith;
import org.robolectric.Robolectric;
import org.robolectric.RobolectricTestRunner;
import org.robolectric.RuntimeEnvironment;
import org.robolectric.annotation.Config;
import org.robolectric.annotation.GraphicsMode;
import org.robolectric.shadows.ShadowDialog;

/**
 * Compares pictures of all screens with those in {@code pictures}. `build.py test-app --record` overwrites them; look
 * at each before you commit it. The times are fixed so that pictures are repeatable; they are not measurements.
 */
@RunWith(RobolectricTestRunner.class)
@GraphicsMode(GraphicsMode.Mode.NATIVE)
@Config(sdk = 34)
public final class ScreenshotTest {
    private static final boolean RECORD = Boolean.getBoolean("mobilevd.record");
    private static final Path GOLDEN = Phone.ROOT.resolve("android_app/app/src/test/pictures");
    private static final Path FOUND = Phone.ROOT.resolve("build/android/pictures");
    // Another processor may round pixels differently, and a running time may show another digit. A moved word changes
    // far more pixels.
    private static final int SAME = 24;
    private static final double MAY_DIFFER = 0.001;

    private final List<String> wrong = new ArrayList<>();

    @Test
    @Config(qualifiers = "w411dp-h891dp-port-notnight-mdpi")
    public void uprightLight() throws Exception {
        everyScreen("upright-light");
    }

    @Test
    @Config(qualifiers = "w411dp-h891dp-port-night-mdpi")
    public void uprightDark() throws Exception {
        everyScreen("upright-dark");
    }

    @Test
    @Config(qualifiers = "w891dp-h411dp-land-notnight-mdpi")
    public void wideLight() throws Exception {
        everyScreen("wide-light");
    }

    @Test
    @Config(qualifiers = "w891dp-h411dp-land-night-mdpi")
    public void wideDark() throws Exception {
        everyScreen("wide-dark");
    }

    @Test
    @Config(qualifiers = "w411dp-h891dp-port-notnight-mdpi")
    public void modelsLight() throws Exception {
        everyStateOfModels("upright-light");
    }

    @Test
    @Config(qualifiers = "w411dp-h891dp-port-night-mdpi")
    public void modelsDark() throws Exception {
        everyStateOfModels("upright-dark");
    }

    @Test
    @Config(qualifiers = "de-w891dp-h411dp-land-night-mdpi")
    public void germanWide() throws Exception {
        clip("german-wide-dark", Backend.CPU);
    }

    @Test
    @Config(qualifiers = "de-w411dp-h891dp-port-notnight-mdpi", fontScale = 1.6f)
    public void germanInLargeLetters() throws Exception {
        Phone phone = new Phone();
        crashed(phone);
        phone.open();
        phone.choosePicture();
        crashed(phone);
        phone.open();
        shoot("german-large-crash", phone.activity());
        phone.click(R.id.message_close);
        phone.make();
        fixTimes(phone, Backend.CPU);
        shoot("german-large-clip", phone.activity());
        report();
    }

    /** The screen after a run on an NPU, with invented times: no NPU runs here. */
    @Test
    @Config(qualifiers = "w411dp-h891dp-port-notnight-mdpi")
    public void onAnNpu() throws Exception {
        clip("npu-upright-light", Backend.NPU);
    }

    @Test
    @Config(qualifiers = "w411dp-h891dp-port-night-mdpi")
    public void onAnNpuInTheDark() throws Exception {
        clip("npu-upright-dark", Backend.NPU);
    }

    @Test
    @Config(qualifiers = "w411dp-h891dp-port-notnight-xhdpi")
    public void forTheReadme() throws Exception {
        clip("readme", Backend.CPU);
    }

    private void clip(String name, Backend backend) throws Exception {
        Phone phone = new Phone();
        phone.open();
        phone.choosePicture();
        phone.make();
        fixTimes(phone, backend);
        shoot(name, phone.activity());
        report();
    }

    private void everyScreen(String how) throws Exception {
        Phone phone = new Phone();
        phone.openFirst(() -> 5_000_000).open();
        phone.untilIdle();
        shoot("no-space-" + how, phone.activity());
        Door unpacking = phone.openFirst(() -> Long.MAX_VALUE);
        unpacking.open();
        phone.untilDone(0.4);
        shoot("unpacking-" + how, phone.activity());
        phone.untilIdle();

        Gate gate = new Gate("unet");
        phone.restart(gate.runtimes());
        shoot("start-" + how, phone.open());
        phone.choosePicture();
        shoot("picture-" + how, phone.activity());
        phone.click(R.id.go);
        phone.untilLoading("unet");
        phone.setTimes(8.4);
        shadowOf(Looper.getMainLooper()).idleFor(2300, TimeUnit.MILLISECONDS);
        shoot("running-" + how, phone.activity());
        gate.open();
        phone.untilIdle();
        fixTimes(phone, Backend.CPU);
        shoot("clip-" + how, phone.activity());
        crashed(phone);
        shoot("crash-" + how, phone.open());

        Intent nothing = new Intent().putExtra("run_id", "x").putExtra("artifact", "demo");
        shoot("benchmark-" + how, Robolectric.buildActivity(BenchmarkActivity.class, nothing).setup().get());
        phone.until("the measuring is over", () -> true);
        report();
    }

    private void everyStateOfModels(String how) throws Exception {
        Phone phone = new Phone();
        phone.open();
        Path demo = phone.modelFolder();
        phone.openModel("my-model.mvd", phone.mvd());
        phone.untilIdle();
        shoot("installed-" + how, phone.activity());
        phone.studio().closeMessage();

        phone.makeNewer(demo);
        phone.studio().refresh();
        phone.until("the change is noticed", () -> phone.state().models().get(0).problem() != null);
        phone.click(R.id.model);
        Dialog dialog = ShadowDialog.getLatestDialog();
        shoot("models-" + how, Phone.screenshot(phone.activity(), dialog));
        dialog.dismiss();

        Files.write(phone.modelFolder().resolve("unet/model.onnx.data"), new byte[10]);
        phone.studio().refresh();
        phone.until("the loss is noticed", () -> phone.state().manifest() == null);
        shoot("damaged-" + how, phone.activity());
        report();
    }

    /** Start the app as after a crash. */
    private static void crashed(Phone phone) throws IOException {
        Files.writeString(
                phone.app.getNoBackupFilesDir().toPath().resolve("running.json"),
                "{\"artifact\": \"demo\", \"component\": \"unet\", \"part\": 1, \"parts\": 1,"
                        + " \"backend\": \"npu\", \"stage\": \"load\"}");
        phone.restart();
    }

    /** Open the app with its last clip, and replace backend and times of the run. */
    private static void fixTimes(Phone phone, Backend backend) throws IOException {
        File file = new File(phone.app.getNoBackupFilesDir(), "clip");
        Result made = Result.read(file);
        double[] ms = {9.2, 31, 412, 1240};
        List<Result.Row> rows = new ArrayList<>();
        for (Result.Row row : made.rows()) {
            double time = ms[rows.size()] / (backend == Backend.NPU ? 20 : 1);
            rows.add(
                    new Result.Row(
                            row.component(), backend, 20, time, backend == Backend.NPU ? null : row.whyNotNpu()));
        }
        new Result(
                        made.width(), made.height(), made.fps(), made.seed(), made.frames(), rows,
                        backend == Backend.NPU ? 231 : 1890, null)
                .write(file);
        phone.restart();
        phone.open();
        phone.until("the clip is back", () -> phone.state().result() != null);
    }

    private void shoot(String name, Activity activity) throws IOException {
        shoot(name, Phone.screenshot(activity));
    }

    private void shoot(String name, Bitmap found) throws IOException {
        Path golden = GOLDEN.resolve(name + ".png");
        if (RECORD) {
            write(found, golden);
            return;
        }
        Bitmap expected = BitmapFactory.decodeFile(golden.toString());
        if (expected == null || differing(expected, found) > MAY_DIFFER) {
            write(found, FOUND.resolve(name + ".png"));
            wrong.add(name);
        }
    }

    /** The fraction of pixels that differ; 1 for different sizes. */
    private static double differing(Bitmap expected, Bitmap found) {
        int width = expected.getWidth();
        int height = expected.getHeight();
        if (width != found.getWidth() || height != found.getHeight()) {
            return 1;
        }
        int[] first = new int[width * height];
        int[] second = new int[width * height];
        expected.getPixels(first, 0, width, 0, 0, width, height);
        found.getPixels(second, 0, width, 0, 0, width, height);
        int count = 0;
        for (int i = 0; i < first.length; i++) {
            for (int shift = 0; shift < 24; shift += 8) {
                if (Math.abs((first[i] >> shift & 0xFF) - (second[i] >> shift & 0xFF)) > SAME) {
                    count++;
                    break;
                }
            }
        }
        return (double) count / first.length;
    }

    private static void write(Bitmap bitmap, Path path) throws IOException {
        Files.createDirectories(path.getParent());
        try (FileOutputStream out = new FileOutputStream(path.toFile())) {
            assertTrue(bitmap.compress(Bitmap.CompressFormat.PNG, 100, out));
        }
    }

    private void report() {
        assertEquals("pictures differ; the new ones are in " + FOUND, List.of(), wrong);
    }
}
