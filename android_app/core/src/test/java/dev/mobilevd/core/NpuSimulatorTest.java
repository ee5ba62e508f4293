package dev.mobilevd.core;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertFalse;
import static org.junit.Assert.assertTrue;

import java.io.RandomAccessFile;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.stream.Collectors;
import org.junit.Before;
import org.junit.Rule;
import org.junit.Test;
import org.junit.rules.TemporaryFolder;

/**
 * Runs context binaries on the NPU's simulator, with the plugin of onnxruntime-qnn's Linux wheel. The Java code is the
 * phone's.
 */
public class NpuSimulatorTest {
    private static final String PLUGIN = "libonnxruntime_providers_qnn.so";

    @Rule public final TemporaryFolder temporary = new TemporaryFolder();
    private Artifact artifact;
    private Path libraries;
    private Path scratch;

    @Before
    public void open() throws Exception {
        artifact = Artifact.open(Reference.folder("mobilevd.npu"));
        libraries = Reference.folder("mobilevd.qnn");
        scratch = temporary.newFolder("scratch").toPath();
    }

    private NpuRuntime runtime(String soc, SdkVersion sdk) throws MobileVdException {
        return NpuRuntime.start(
                new NpuRuntime.Settings(
                        libraries.resolve(PLUGIN).toString(), libraries.resolve("libQnnHtp.so").toString(), soc, sdk,
                        scratch));
    }

    private NpuRuntime phone() throws MobileVdException {
        return runtime("SM8650", SdkVersion.ofLibrary(libraries.resolve("libQnnHtp.so")));
    }

    private Clip generate(NpuRuntime npu, Runtimes.Asked asked) throws MobileVdException {
        Manifest.PipelineSpec spec = artifact.manifest().pipeline();
        return generate(npu, asked, new float[3 * spec.height() * spec.width()], 7);
    }

    private Clip generate(NpuRuntime npu, Runtimes.Asked asked, float[] image, long seed) throws MobileVdException {
        RunTrace trace = new RunTrace(temporary.getRoot().toPath().resolve("trace.json"));
        return new Pipeline(artifact, Runtimes.of(new CpuRuntime(scratch), npu), Golden.PLENTY, trace)
                .generate(image, seed, asked, Pipeline.Listener.NONE, Golden.NEVER);
    }

    /** The first component is enough to test errors while loading. */
    private Runner loadFirst(Path root) throws MobileVdException {
        Artifact opened = new Artifact(root, artifact.manifest(), artifact.manifestSha256());
        Manifest.Component component = artifact.manifest().components().get(0);
        NpuRuntime npu = phone();
        return npu.load(opened, component, npu.parts(component).get(0));
    }

    @Test
    public void makesTheClipThatPythonsSimulationMakes() throws Exception {
        Reference reference = Reference.of("mobilevd.npuReference");
        for (String picture : reference.pictures) {
            float[] image = reference.image(picture, artifact.manifest().pipeline());
            Clip clip = generate(phone(), Runtimes.Asked.NPU, image, reference.seed);
            reference.assertSame(picture, clip);
            for (ComponentRun run : clip.runs()) {
                System.out.printf("  %s: load %.0f ms, run %.0f ms%n", run.component(), run.loadMs(), run.ms().get(0));
                Manifest.Component component = artifact.manifest().component(run.component());
                assertEquals(Backend.NPU, run.backend());
                assertEquals(component.npu().get(0).parts().size(), run.npuNodes());
                assertEquals(0, run.cpuNodes());
            }
        }
        assertEquals(List.of(), Golden.files(scratch));
    }

    @Test
    public void theWheelsLibraryKnowsItsVersion() throws Exception {
        SdkVersion sdk = phone().sdk();
        assertTrue(sdk.toString(), sdk.toString().matches("v2\\.[0-9]+\\.[0-9]+\\.[0-9]{12}"));
        for (Manifest.Component component : artifact.manifest().components()) {
            assertFalse(sdk.isOlderThan(component.npu().get(0).sdk()));
        }
    }

    @Test
    public void wrappersHaveTheVersionThatPhonesRead() throws Exception {
        for (Manifest.Component component : artifact.manifest().components()) {
            for (Manifest.Part part : component.npu().get(0).parts()) {
                byte[] wrapper = Files.readAllBytes(artifact.path(part.files().get("wrapper")));
                // ModelProto.ir_version is field 1, a varint, and comes first.
                assertEquals(0x08, wrapper[0]);
                assertEquals(10, wrapper[1]);
            }
        }
    }

    @Test
    public void aBinaryForAnotherChipIsRefusedBeforeItIsLoaded() throws Exception {
        NpuRuntime other = runtime("SM8750", phone().sdk());
        MobileVdException error =
                Golden.assertFails(Problem.NPU_OTHER_CHIP, () -> generate(other, Runtimes.Asked.NPU));
        assertEquals(
                List.of(artifact.manifest().components().get(0).name(), "SM8650", "SM8750"), error.arguments());
    }

    @Test
    public void aRuntimeThatIsOlderThanTheBinaryIsRefused() throws Exception {
        NpuRuntime old = runtime("SM8650", SdkVersion.parse("v2.31.0.250101000000"));
        MobileVdException error =
                Golden.assertFails(Problem.NPU_RUNTIME_OLD, () -> generate(old, Runtimes.Asked.NPU));
        assertEquals("v2.31.0.250101000000", error.arguments().get(2));
    }

    @Test
    public void whatTheNpuCannotRunRunsOnTheCpuAndSaysWhy() throws Exception {
        Clip clip = generate(runtime("SM7325", phone().sdk()), Runtimes.Asked.AUTO);
        for (ComponentRun run : clip.runs()) {
            assertEquals(Backend.CPU, run.backend());
            assertEquals(Problem.NPU_OTHER_CHIP, run.whyNotNpu().problem());
            assertEquals(0, run.npuNodes());
        }
    }

    @Test
    public void aBinaryThatIsCutOrMissingIsRefusedReadably() throws Exception {
        Path copy = temporary.getRoot().toPath().resolve("copy");
        Manifest.Part part = artifact.manifest().components().get(0).npu().get(0).parts().get(0);
        for (Manifest.FileEntry entry : part.files().values()) {
            Files.createDirectories(copy.resolve(entry.path()).getParent());
            Files.copy(artifact.path(entry), copy.resolve(entry.path()));
        }
        Path context = copy.resolve(part.files().get("context").path());
        try (RandomAccessFile file = new RandomAccessFile(context.toFile(), "rw")) {
            file.setLength(file.length() / 2);
        }
        MobileVdException cut = Golden.assertFails(Problem.NPU_REFUSED, () -> loadFirst(copy));
        System.out.println("cut: " + cut.getMessage());
        Files.delete(context);
        MobileVdException missing = Golden.assertFails(Problem.NPU_REFUSED, () -> loadFirst(copy));
        System.out.println("missing: " + missing.getMessage());
    }

    @Test
    public void whatNoNpuRunsIsRefusedRatherThanRunOnTheCpu() throws Exception {
        Path copy = temporary.getRoot().toPath().resolve("copy");
        Manifest.Part part = artifact.manifest().components().get(0).npu().get(0).parts().get(0);
        Path wrapper = copy.resolve(part.files().get("wrapper").path());
        Files.createDirectories(wrapper.getParent());
        Files.copy(Golden.VECTORS.resolve("not-for-npus.onnx"), wrapper);
        MobileVdException error = Golden.assertFails(Problem.NPU_REFUSED, () -> loadFirst(copy));
        assertTrue(error.getMessage(), error.getMessage().contains("fallback"));
    }

    @Test
    public void benchmarksOnTheSimulator() throws Exception {
        Path folder = temporary.getRoot().toPath().resolve("benchmarks");
        ArtifactStore store = new ArtifactStore(artifact.root().getParent(), path -> Long.MAX_VALUE);
        String name = artifact.root().getFileName().toString();
        String first = artifact.manifest().components().get(0).name();
        Benchmark.Device device =
                new Benchmark.Device("E", "M", "SM8650", "14", 34, "0.1.0", Golden.PLENTY, () -> "none");
        Runtimes runtimes = Runtimes.of(new CpuRuntime(scratch), phone());
        Path file =
                Benchmark.run(
                        new Benchmark.Request("sim", name, 2, 1, Runtimes.Asked.NPU, Set.of(first)), device,
                        store, () -> runtimes,
                        new RunTrace(temporary.getRoot().toPath().resolve("trace.json")), folder, Golden.NEVER);
        Map<String, Object> result = Json.readObject(Files.readAllBytes(file));
        assertEquals(null, result.get("error"));
        assertEquals(
                List.of("npu"),
                Golden.objects(result.get("components")).stream()
                        .map(component -> component.get("backend"))
                        .collect(Collectors.toList()));
        assertEquals(phone().sdk().toString(), ((Map<?, ?>) result.get("runtime")).get("qnn"));
    }
}
