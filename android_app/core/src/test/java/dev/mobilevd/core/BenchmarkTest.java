package dev.mobilevd.core;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertNull;
import static org.junit.Assert.assertTrue;

import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.Paths;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.function.Supplier;
import java.util.stream.Collectors;
import org.junit.Before;
import org.junit.Rule;
import org.junit.Test;
import org.junit.rules.TemporaryFolder;

public class BenchmarkTest {
    @Rule public final TemporaryFolder temporary = new TemporaryFolder();
    private final List<String> thermal = new ArrayList<>(List.of("none", "light"));
    private Path folder;
    private ArtifactStore store;
    private Runtimes runtimes;

    @Before
    public void make() throws Exception {
        folder = temporary.getRoot().toPath().resolve("files/benchmarks");
        Path artifacts = temporary.getRoot().toPath().resolve("artifacts");
        Golden.copy(artifacts.resolve("tiny"));
        store = new ArtifactStore(artifacts, path -> Long.MAX_VALUE);
        runtimes =
                Runtimes.withoutNpu(
                        new CpuRuntime(temporary.newFolder("scratch").toPath()),
                        new MobileVdException(Problem.NPU_NOT_IN_APP));
    }

    private static Benchmark.Request request(String runId, String artifact, int samples, Set<String> components) {
        return new Benchmark.Request(runId, artifact, samples, 1, Runtimes.Asked.AUTO, components);
    }

    private Map<String, Object> run(Benchmark.Request request) throws Exception {
        return run(request, () -> runtimes);
    }

    private Map<String, Object> run(Benchmark.Request request, Supplier<Runtimes> starting) throws Exception {
        Benchmark.Device device =
                new Benchmark.Device(
                        "Example", "Made-up Phone", null, "9", 28, "0.1.0", Golden.PLENTY, () -> thermal.remove(0));
        RunTrace trace = new RunTrace(temporary.getRoot().toPath().resolve("trace.json"));
        Path file = Benchmark.run(request, device, store, starting, trace, folder, Golden.NEVER);
        assertEquals(List.of(file), Golden.files(folder));
        String results = System.getProperty("mobilevd.results", "");
        if (!results.isEmpty()) { // read by the Python tests
            Files.copy(file, Paths.get(results).resolve(file.getFileName()));
        }
        return Json.readObject(Files.readAllBytes(file));
    }

    /** The keys of nested objects: the structure of a file without its values. */
    private static Object form(Object value) {
        if (value instanceof Map<?, ?> object) {
            return object.entrySet().stream()
                    .collect(Collectors.toMap(e -> (String) e.getKey(), e -> String.valueOf(form(e.getValue()))));
        }
        return value instanceof List<?> items && !items.isEmpty() ? List.of(form(items.get(0))) : "value";
    }

    @Test
    public void writesTheFormOfTheGoldenExample() throws Exception {
        Map<String, Object> result = run(request("run-1", "tiny", 3, Set.of()));
        assertEquals(form(Golden.json("benchmark.json")), form(result));
        assertEquals("done", result.get("state"));
        assertNull(result.get("error"));
        assertEquals("run-1", result.get("run_id"));
        assertEquals("auto", result.get("asked_backend"));
        assertEquals(3L, result.get("samples"));
        assertEquals(1L, result.get("warmup"));
        assertEquals("none", result.get("thermal_before"));
        assertEquals("light", result.get("thermal_after"));
        Map<?, ?> runtime = (Map<?, ?>) result.get("runtime");
        assertEquals("1.29.0", runtime.get("onnxruntime"));
        assertNull(runtime.get("qnn"));
        Map<?, ?> artifact = (Map<?, ?>) result.get("artifact");
        assertEquals(store.open("tiny").manifestSha256(), artifact.get("manifest_sha256"));
        List<Map<String, Object>> components = Golden.objects(result.get("components"));
        assertEquals(4, components.size());
        for (Map<String, Object> component : components) {
            assertEquals("cpu", component.get("backend"));
            assertEquals(0L, component.get("npu_nodes"));
            assertTrue((Long) component.get("cpu_nodes") > 0);
            assertEquals(3, Golden.list(component.get("ms")).size());
        }
    }

    @Test
    public void measuresOnlyWhatWasAsked() throws Exception {
        Map<String, Object> result = run(request("run-2", "tiny", 2, Set.of("unet", "decoder")));
        assertEquals(
                List.of("unet", "decoder"),
                Golden.objects(result.get("components")).stream().map(c -> c.get("name")).collect(Collectors.toList()));
    }

    @Test
    public void aFailureIsAResultThatNamesTheStep() throws Exception {
        Path model = store.open("tiny").root().resolve("decoder/model.onnx.data");
        byte[] content = Files.readAllBytes(model);
        content[0] ^= 1;
        Files.write(model, content);
        Map<String, Object> result = run(request("run-3", "tiny", 2, Set.of()));
        assertEquals("failed", result.get("state"));
        Map<?, ?> error = (Map<?, ?>) result.get("error");
        assertEquals("decoder", error.get("component"));
        assertEquals("load", error.get("step"));
        assertTrue(error.toString(), error.get("message").toString().startsWith("decoder/model.onnx.data is damaged"));
        assertEquals(3, Golden.objects(result.get("components")).size());
    }

    @Test
    public void whatCannotBeMeasuredIsAResultToo() throws Exception {
        Map<String, Object> missing = run(request("run-4", "nobody", 1, Set.of()));
        assertEquals("failed", missing.get("state"));
        assertNull(((Map<?, ?>) missing.get("error")).get("component"));
        Files.delete(folder.resolve("run-4.json"));
        thermal.addAll(List.of("none", "none"));
        Map<String, Object> unknown = run(request("run-5", "tiny", 1, Set.of("nobody")));
        assertTrue(unknown.get("error").toString(), unknown.get("error").toString().contains("nobody"));
    }

    @Test
    public void aRuntimeThatDoesNotStartIsAResultToo() throws Exception {
        Map<String, Supplier<Runtimes>> failing =
                Map.of(
                        "run-8-state", () -> fail(new IllegalStateException("two of them")),
                        "run-8-memory", () -> fail(new OutOfMemoryError()),
                        "run-8-library", () -> fail(new UnsatisfiedLinkError("no libonnxruntime.so")),
                        "run-8-again", () -> fail(new NoClassDefFoundError("OrtEnvironment")));
        for (Map.Entry<String, Supplier<Runtimes>> one : failing.entrySet()) {
            thermal.addAll(List.of("none", "none"));
            Map<String, Object> result = run(request(one.getKey(), "tiny", 1, Set.of()), one.getValue());
            assertEquals("failed", result.get("state"));
            String message = (String) ((Map<?, ?>) result.get("error")).get("message");
            assertTrue(message, message.matches("java[.]lang[.]\\w+(: .+)?"));
            assertEquals("unknown", ((Map<?, ?>) result.get("runtime")).get("onnxruntime"));
            Files.delete(folder.resolve(one.getKey() + ".json"));
        }
    }

    private static Runtimes fail(RuntimeException error) {
        throw error;
    }

    private static Runtimes fail(Error error) {
        throw error;
    }

    @Test
    public void whatCannotBeAResultIsRefused() {
        for (int samples : new int[] {0, -1, 10_001}) {
            Golden.assertFails(Problem.BENCHMARK_INVALID, () -> run(request("run-6", "tiny", samples, Set.of())));
        }
        for (String id : List.of("", "../x", ".hidden", "a b", "a/b", "a".repeat(65))) {
            Golden.assertFails(Problem.BENCHMARK_INVALID, () -> run(request(id, "tiny", 1, Set.of())));
        }
        assertTrue(Files.notExists(folder));
    }

    @Test
    public void saysMeanwhileThatItRuns() throws Exception {
        List<Map<String, Object>> seen = new ArrayList<>();
        MemoryInfo watching =
                () -> {
                    Path partial = folder.resolve(".run-7.json.partial");
                    if (Files.exists(partial)) {
                        try {
                            seen.add(Json.readObject(Files.readAllBytes(partial)));
                        } catch (Exception error) {
                            throw new IllegalStateException(error);
                        }
                    }
                    return Golden.PLENTY.read();
                };
        Benchmark.Device device =
                new Benchmark.Device("E", "M", "SM8650", "14", 34, "0.1.0", watching, () -> null);
        RunTrace trace = new RunTrace(temporary.getRoot().toPath().resolve("trace.json"));
        Benchmark.run(request("run-7", "tiny", 1, Set.of()), device, store, () -> runtimes, trace, folder, Golden.NEVER);
        assertTrue(seen.toString(), seen.contains(Map.of("state", "running", "component", "unet", "sample", 0L)));
    }
}
