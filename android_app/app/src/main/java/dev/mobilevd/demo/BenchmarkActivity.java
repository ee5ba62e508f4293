package dev.mobilevd.demo;

import android.app.Activity;
import android.content.Intent;
import android.os.Bundle;
import android.os.Handler;
import android.os.Looper;
import android.view.View;
import android.view.WindowManager;
import android.widget.TextView;
import dev.mobilevd.core.Benchmark;
import dev.mobilevd.core.Cancellation;
import dev.mobilevd.core.MobileVdException;
import dev.mobilevd.core.Runtimes;
import java.util.Set;
import java.util.TreeSet;

/**
 * Measures an artifact for {@code mobilevd-deploy profile --adb}: intent extras are the request, a JSON file is the
 * result. Only adb's shell may start it. A rotation does not restart it (see the manifest).
 */
public final class BenchmarkActivity extends Activity {
    private final Handler main = new Handler(Looper.getMainLooper());
    private final Cancellation cancellation = new Cancellation();

    @Override
    protected void onCreate(Bundle state) {
        super.onCreate(state);
        setContentView(R.layout.benchmark);
        Edges.fit(this, findViewById(R.id.screen));
        // A locked phone with a dark screen is slower.
        getWindow().addFlags(WindowManager.LayoutParams.FLAG_KEEP_SCREEN_ON);
        setShowWhenLocked(true);
        setTurnScreenOn(true);
        findViewById(R.id.cancel).setOnClickListener(view -> cancellation.cancel());
        if (state != null) {
            finish(); // the process with the run ended; the host notices that no result arrives
            return;
        }
        try {
            measure(request(getIntent()));
        } catch (MobileVdException problem) {
            ended(Words.of(problem));
        }
    }

    @Override
    protected void onDestroy() {
        cancellation.cancel();
        super.onDestroy();
    }

    private static Benchmark.Request request(Intent intent) throws MobileVdException {
        Set<String> components = new TreeSet<>();
        for (String name : text(intent, "components", "").split(",")) {
            if (!name.isEmpty()) {
                components.add(name);
            }
        }
        return new Benchmark.Request(
                text(intent, "run_id", ""),
                text(intent, "artifact", ""),
                intent.getIntExtra("samples", 10),
                intent.getIntExtra("warmup", 2),
                Runtimes.Asked.of(text(intent, "backend", Runtimes.Asked.AUTO.id())),
                components);
    }

    private static String text(Intent intent, String key, String otherwise) {
        String value = intent.getStringExtra(key);
        return value == null ? otherwise : value;
    }

    private void measure(Benchmark.Request request) {
        say(Words.of(R.string.benchmark_running, request.artifact()));
        DemoApp app = (DemoApp) getApplication();
        Device device = app.device();
        app.studio()
                .afterwards(
                        () -> {
                            Words end;
                            try {
                                Benchmark.run(
                                        request, device.describe(), device.store(), device::runtimes,
                                        device.trace(), device.benchmarks(), cancellation);
                                end = Words.of(R.string.benchmark_done);
                            } catch (MobileVdException problem) {
                                end = Words.of(problem);
                            }
                            Words said = end;
                            main.post(() -> ended(said));
                        });
    }

    private void ended(Words text) {
        say(text);
        findViewById(R.id.progress).setVisibility(View.GONE);
        findViewById(R.id.cancel).setVisibility(View.GONE);
    }

    private void say(Words text) {
        ((TextView) findViewById(R.id.state)).setText(text.in(this));
    }
}
