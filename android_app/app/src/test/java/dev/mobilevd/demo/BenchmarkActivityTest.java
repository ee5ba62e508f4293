package dev.mobilevd.demo;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertFalse;
import static org.junit.Assert.assertTrue;

import android.content.ComponentName;
import android.content.Intent;
import android.content.pm.ActivityInfo;
import android.view.View;
import android.widget.TextView;
import dev.mobilevd.core.Runtimes;
import java.nio.file.Files;
import java.nio.file.Path;
import org.json.JSONObject;
import org.junit.Test;
import org.junit.runner.RunWith;
import org.robolectric.Robolectric;
import org.robolectric.RobolectricTestRunner;
import org.robolectric.android.controller.ActivityController;
import org.robolectric.annotation.Config;
import org.robolectric.annotation.GraphicsMode;

/** The request is an intent; the result is a JSON file. */
@RunWith(RobolectricTestRunner.class)
@GraphicsMode(GraphicsMode.Mode.NATIVE)
@Config(sdk = 34, qualifiers = "w411dp-h891dp-mdpi")
public final class BenchmarkActivityTest {
    private final Phone phone = new Phone();

    @Test
    public void theResultIsWritten() throws Exception {
        Intent intent = new Intent();
        intent.putExtra("artifact", "demo").putExtra("samples", 3).putExtra("warmup", 1).putExtra("backend", "auto");
        intent.putExtra("components", "decoder,vae_encoder").putExtra("run_id", "test-1");
        BenchmarkActivity activity = run(intent);
        assertEquals("Done.", state(activity));
        JSONObject result = new JSONObject(Files.readString(results().resolve("test-1.json")));
        assertEquals(result.optString("error"), "done", result.getString("state"));
        assertEquals("0.1.0", result.getString("app_version"));
        assertEquals("auto", result.getString("asked_backend"));
        assertEquals(2, result.getJSONArray("components").length());
        JSONObject first = result.getJSONArray("components").getJSONObject(0);
        assertEquals("vae_encoder", first.getString("name"));
        assertEquals("cpu", first.getString("backend"));
        assertEquals(3, first.getJSONArray("ms").length());
        assertEquals("none", result.getString("thermal_before"));
        assertFalse("nothing is left aside", Files.exists(results().resolve(".test-1.json.partial")));
    }

    @Test
    public void aFailureIsAResultToo() throws Exception {
        Intent intent = new Intent().putExtra("artifact", "demo").putExtra("backend", "npu").putExtra("run_id", "r");
        run(intent);
        JSONObject result = new JSONObject(Files.readString(results().resolve("r.json")));
        assertEquals("failed", result.getString("state"));
        assertTrue(result.getJSONObject("error").getString("message").contains("no libraries for the NPU"));
    }

    @Test
    public void alsoWhereTheRuntimeDoesNotLoad() throws Exception {
        phone.app.start(
                new Device(phone.app) {
                    @Override
                    synchronized Runtimes runtimes() {
                        throw new UnsatisfiedLinkError("no libonnxruntime.so");
                    }
                });
        run(new Intent().putExtra("artifact", "demo").putExtra("run_id", "r"));
        JSONObject result = new JSONObject(Files.readString(results().resolve("r.json")));
        assertEquals("failed", result.getString("state"));
        assertTrue(result.getJSONObject("error").getString("message").contains("no libonnxruntime.so"));
    }

    @Test
    public void whatCannotBeDoneIsSaid() {
        assertTrue(state(run(new Intent().putExtra("backend", "gpu"))).contains("auto, npu or cpu, not gpu"));
        assertTrue(state(run(new Intent().putExtra("run_id", "../x"))).contains("../x"));
    }

    @Test
    public void onlyTheShellMayStartIt() throws Exception {
        ActivityInfo info =
                phone.app.getPackageManager().getActivityInfo(new ComponentName(phone.app, BenchmarkActivity.class), 0);
        assertEquals("android.permission.DUMP", info.permission);
        assertTrue(info.exported);
    }

    private BenchmarkActivity run(Intent intent) {
        ActivityController<BenchmarkActivity> controller = Robolectric.buildActivity(BenchmarkActivity.class, intent);
        BenchmarkActivity activity = controller.setup().get();
        phone.until(
                "the run has ended",
                () -> activity.findViewById(R.id.progress).getVisibility() == View.GONE);
        return activity;
    }

    private Path results() {
        return phone.app.device().benchmarks();
    }

    private static String state(BenchmarkActivity activity) {
        return ((TextView) activity.findViewById(R.id.state)).getText().toString();
    }
}
