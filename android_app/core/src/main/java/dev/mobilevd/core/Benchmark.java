package dev.mobilevd.core;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeSet;
import java.util.function.Supplier;
import java.util.regex.Pattern;
import java.util.stream.Collectors;

/**
 * Measures an artifact's components and writes the file that benchmark.schema.json describes.
 *
 * <p>The picture is a fixed gradient and the seed is 0: run times do not depend on the values.
 */
public final class Benchmark {
    /** The version of the files that this class writes. */
    public static final int SCHEMA_VERSION = 1;

    private static final Pattern RUN_ID = Pattern.compile("[A-Za-z0-9][A-Za-z0-9_-]{0,63}");
    private static final int MOST_CALLS = 10_000;

    /**
     * A request. The intent extras have the same names.
     *
     * @param artifact name in the store
     * @param components names of those to measure; empty: all
     */
    public record Request(
            String runId, String artifact, int samples, int warmup, Runtimes.Asked backend, Set<String> components) {}

    /**
     * The device and the app, as the result describes them.
     *
     * @param soc Build.SOC_MODEL; null before Android 12
     * @param thermal returns Android's name of the thermal status, "none" to "shutdown"; null before Android 10
     */
    public record Device(
            String manufacturer, String model, String soc, String android, int sdkLevel, String appVersion,
            MemoryInfo memory, Supplier<String> thermal) {}

    private final Request request;
    private final Device device;
    private final Path file;
    private final List<ComponentRun> measured = new ArrayList<>();
    private String component;
    private Pipeline.Stage stage;

    private Benchmark(Request request, Device device, Path file) {
        this.request = request;
        this.device = device;
        this.file = file;
    }

    /**
     * Measure and write {@code folder}/RUN_ID.json. During the run .RUN_ID.json.partial has the progress. A failed run
     * writes a result with the state "failed".
     *
     * @param starting returns the runtimes; an exception of it is a failure of the run
     * @return the file
     * @throws MobileVdException {@link Problem#BENCHMARK_INVALID} for a run id that is not a valid file name, or for
     *     invalid numbers of calls; {@link Problem#NOT_WRITTEN}
     */
    public static Path run(
            Request request, Device device, ArtifactStore store, Supplier<Runtimes> starting, RunTrace trace,
            Path folder, Cancellation cancellation)
            throws MobileVdException {
        if (!RUN_ID.matcher(request.runId()).matches()) {
            throw new MobileVdException(Problem.BENCHMARK_INVALID, "run id \"" + request.runId() + "\"");
        }
        if (request.samples() < 1 || request.samples() > MOST_CALLS || request.warmup() < 0
                || request.warmup() > MOST_CALLS) {
            throw new MobileVdException(
                    Problem.BENCHMARK_INVALID, request.samples() + " samples, " + request.warmup() + " warm-up calls");
        }
        try {
            Files.createDirectories(folder);
        } catch (IOException error) {
            throw new MobileVdException(error, Problem.NOT_WRITTEN, folder.toString(), error.toString());
        }
        Path file = folder.resolve(request.runId() + ".json");
        new Benchmark(request, device, file).run(store, starting, trace, cancellation);
        return file;
    }

    private void run(ArtifactStore store, Supplier<Runtimes> starting, RunTrace trace, Cancellation cancellation)
            throws MobileVdException {
        MemoryInfo.Snapshot memory = device.memory().read();
        String thermalBefore = device.thermal().get();
        Throwable failure = null;
        String onnxruntime = "unknown";
        SdkVersion qnn = null;
        try {
            Runtimes runtimes = starting.get();
            onnxruntime = runtimes.onnxruntime();
            qnn = runtimes.qnn();
            Artifact artifact = store.open(request.artifact());
            check(artifact.manifest());
            Pipeline.Request calls =
                    new Pipeline.Request(
                            picture(artifact.manifest().pipeline()), 0, request.backend(), request.warmup(),
                            request.samples(), request.components().isEmpty() ? null : request.components());
            new Pipeline(artifact, runtimes, device.memory(), trace).run(calls, new Watcher(), cancellation);
        } catch (MobileVdException | RuntimeException | OutOfMemoryError | LinkageError error) {
            failure = error;
        }
        Map<String, Object> result = new LinkedHashMap<>();
        result.put("schema_version", SCHEMA_VERSION);
        result.put("run_id", request.runId());
        result.put("app_version", device.appVersion());
        result.put(
                "artifact",
                fields(
                        "name", request.artifact(), "manifest_sha256",
                        store.manifestSha256(request.artifact())));
        result.put(
                "device",
                fields(
                        "manufacturer", device.manufacturer(), "model", device.model(), "soc", device.soc(),
                        "android", device.android(), "sdk_level", device.sdkLevel()));
        result.put("asked_backend", request.backend().id());
        result.put("samples", request.samples());
        result.put("warmup", request.warmup());
        result.put(
                "runtime",
                fields("onnxruntime", onnxruntime, "qnn", qnn == null ? null : qnn.toString()));
        result.put("components", measured.stream().map(Benchmark::timing).collect(Collectors.toList()));
        result.put("thermal_before", thermalBefore);
        result.put("thermal_after", device.thermal().get());
        result.put(
                "memory", fields("available_bytes", memory.availableBytes(), "total_bytes", memory.totalBytes()));
        result.put("state", failure == null ? "done" : "failed");
        result.put("error", failure == null ? null : error(failure));
        DurableFile.write(file, Json.write(result));
    }

    private void check(Manifest manifest) throws MobileVdException {
        for (String name : new TreeSet<>(request.components())) {
            if (manifest.component(name) == null) {
                throw new MobileVdException(Problem.BENCHMARK_INVALID, "there is no component " + name);
            }
        }
    }

    private Map<String, Object> error(Throwable failure) {
        // An unexpected exception may have no message, so its class is included.
        String message = failure instanceof MobileVdException ? failure.getMessage() : failure.toString();
        return fields("message", message, "component", component, "step", stage == null ? null : stage.id());
    }

    private static Map<String, Object> timing(ComponentRun run) {
        return fields(
                "name", run.component(), "backend", run.backend().id(), "npu_nodes", run.npuNodes(),
                "cpu_nodes", run.cpuNodes(), "load_ms", run.loadMs(), "ms", run.ms(), "peak_bytes", run.peakBytes());
    }

    private static float[] picture(Manifest.PipelineSpec spec) {
        float[] values = new float[3 * spec.height() * spec.width()];
        for (int i = 0; i < values.length; i++) {
            values[i] = 2f * (i % spec.width()) / spec.width() - 1;
        }
        return values;
    }

    private static Map<String, Object> fields(Object... pairs) {
        Map<String, Object> made = new LinkedHashMap<>();
        for (int i = 0; i < pairs.length; i += 2) {
            made.put((String) pairs[i], pairs[i + 1]);
        }
        return made;
    }

    /** Records the current step, and writes it to the partial file, which the host reads. */
    private final class Watcher implements Pipeline.Listener {
        @Override
        public void at(
                String name, int index, int count, Backend backend, Pipeline.Stage now, int call, double fraction) {
            component = name;
            stage = now;
            if (call <= 1) {
                byte[] state = Json.write(fields("state", "running", "component", name, "sample", call));
                try {
                    Files.write(DurableFile.partial(file), state);
                } catch (IOException error) {
                    // Only the progress is lost. Errors of the result itself are reported.
                }
            }
        }

        @Override
        public void finished(ComponentRun run) {
            if (request.components().isEmpty() || request.components().contains(run.component())) {
                measured.add(run);
            }
        }
    }
}
