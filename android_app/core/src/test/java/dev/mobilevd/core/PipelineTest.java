package dev.mobilevd.core;

import static org.junit.Assert.assertArrayEquals;
import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertNotNull;
import static org.junit.Assert.assertNull;
import static org.junit.Assert.assertSame;
import static org.junit.Assert.assertTrue;

import ai.onnxruntime.OrtSession;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.lang.management.ManagementFactory;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.stream.Collectors;
import org.junit.Before;
import org.junit.Rule;
import org.junit.Test;
import org.junit.rules.TemporaryFolder;

public class PipelineTest {
    private static final List<String> NAMES = List.of("image_encoder", "vae_encoder", "unet", "decoder");

    @Rule public final TemporaryFolder temporary = new TemporaryFolder();
    private final List<String> events = new ArrayList<>();
    private Path scratch;
    private Path traceFile;
    private Artifact artifact;
    private ComponentRuntime cpu;

    @Before
    public void make() throws Exception {
        scratch = temporary.newFolder("scratch").toPath();
        traceFile = temporary.getRoot().toPath().resolve("trace.json");
        artifact = Artifact.open(Golden.copy(temporary.getRoot().toPath().resolve("tiny")));
        cpu = new CpuRuntime(scratch);
    }

    /**
     * A fake NPU: runs the parts of the tiny artifact's "binaries", which are plain ONNX, on the CPU, and records what
     * is loaded, run and closed.
     */
    private class TestNpu implements ComponentRuntime {
        private final Map<String, Problem> failures = new HashMap<>();
        /** How many of the next calls fail; by default all. */
        private int failuresLeft = Integer.MAX_VALUE;
        /** The component whose outputs are NaN. */
        private String broken;

        @Override
        public Backend backend() {
            return Backend.NPU;
        }

        @Override
        public List<Manifest.Part> parts(Manifest.Component component) {
            return component.npu().get(0).parts();
        }

        @Override
        public long memoryBytes(Manifest.Part part) {
            return 2 * part.files().get("context").bytes();
        }

        @Override
        public Runner load(Artifact artifact, Manifest.Component component, Manifest.Part part)
                throws MobileVdException {
            Path wrapper = artifact.path(part.files().get("wrapper"));
            String name = wrapper.getFileName().toString().replace(".onnx", "");
            events.add("load " + component.name() + " " + name);
            fail("load " + component.name());
            try (OrtSession.SessionOptions options = new OrtSession.SessionOptions()) {
                Runner real = OrtRunner.load(component.name(), Backend.CPU, wrapper, scratch, options, Map.of());
                return new Runner() {
                    @Override
                    public Map<String, Tensor> run(Map<String, Tensor> inputs, Cancellation cancellation)
                            throws MobileVdException {
                        events.add("run " + inputs.keySet().stream().sorted().collect(Collectors.toList()));
                        fail("run " + component.name());
                        Map<String, Tensor> outputs = real.run(inputs, cancellation);
                        if (component.name().equals(broken)) {
                            outputs.replaceAll((output, value) -> nan(value));
                        }
                        return outputs;
                    }

                    @Override
                    public Placement placement() {
                        return new Placement(1, 0);
                    }

                    @Override
                    public void close() {
                        events.add("close");
                        real.close();
                    }
                };
            }
        }

        private void fail(String where) throws MobileVdException {
            if (failures.containsKey(where) && failuresLeft > 0) {
                failuresLeft--;
                throw new MobileVdException(failures.get(where), where, "because");
            }
        }
    }

    private static Tensor nan(Tensor value) {
        float[] values = value.toArray();
        values[values.length / 2] = Float.NaN;
        long[] shape = value.shape();
        value.close();
        return Tensor.of(values, shape);
    }

    private Pipeline pipeline(Runtimes runtimes) {
        return new Pipeline(artifact, runtimes, Golden.PLENTY, new RunTrace(traceFile));
    }

    private Pipeline onCpu() {
        return pipeline(Runtimes.withoutNpu(cpu, new MobileVdException(Problem.NPU_NOT_IN_APP)));
    }

    private Clip generate(Pipeline pipeline, Runtimes.Asked asked) throws Exception {
        return pipeline.generate(
                Golden.picture(), Golden.clipSeed(), asked, Pipeline.Listener.NONE, Golden.NEVER);
    }

    private static float[] onCpu(Pipeline pipeline, float[] image, long seed) throws MobileVdException {
        return pipeline.generate(image, seed, Runtimes.Asked.CPU, Pipeline.Listener.NONE, Golden.NEVER).frames();
    }

    private static List<Backend> backends(Clip clip) {
        return clip.runs().stream().map(ComponentRun::backend).collect(Collectors.toList());
    }

    @Test
    public void makesPythonsClip() throws Exception {
        Clip clip = generate(onCpu(), Runtimes.Asked.AUTO);
        double sqnr = Golden.sqnr(Golden.clip(), clip.frames());
        assertTrue("SQNR " + sqnr, sqnr > 100);
        assertEquals(new Manifest.PipelineSpec(2, 16, 24, 7), clip.pipeline());
    }

    @Test
    public void anotherSeedOrPictureMakesAnotherClip() throws Exception {
        float[] clip = generate(onCpu(), Runtimes.Asked.CPU).frames();
        float[] seed = onCpu(onCpu(), Golden.picture(), 8);
        float[] grey = onCpu(onCpu(), new float[3 * 16 * 24], Golden.clipSeed());
        assertTrue(Golden.sqnr(clip, seed) < 40);
        assertTrue(Golden.sqnr(clip, grey) < 40);
    }

    @Test
    public void saysWhichBackendRanAndWhyNotTheNpu() throws Exception {
        for (ComponentRun run : generate(onCpu(), Runtimes.Asked.AUTO).runs()) {
            assertEquals(Backend.CPU, run.backend());
            assertEquals(Problem.NPU_NOT_IN_APP, run.whyNotNpu().problem());
            assertEquals(0, run.npuNodes());
            assertTrue(run.cpuNodes() > 0);
            assertEquals(1, run.ms().size());
            assertTrue(run.ms().get(0) > 0 && run.loadMs() > 0);
            assertTrue(run.peakBytes() > 10 << 20);
        }
        assertNull(generate(onCpu(), Runtimes.Asked.CPU).runs().get(0).whyNotNpu());
    }

    @Test
    public void theNpuAloneIsNotTheCpu() {
        Golden.assertFails(Problem.NPU_NOT_IN_APP, () -> generate(onCpu(), Runtimes.Asked.NPU));
    }

    @Test
    public void runsPartsInOrderAndClosesEachBeforeTheNext() throws Exception {
        Clip clip = generate(pipeline(Runtimes.of(cpu, new TestNpu())), Runtimes.Asked.NPU);
        assertEquals(
                List.of(
                        "load image_encoder context", "run [image]", "close",
                        "load vae_encoder context", "run [image, image_noise]", "close",
                        "load unet part0", "run [image_embeds, noise]", "close",
                        "load unet part1", "run [image_latents, moved]", "close",
                        "load decoder context", "run [latents]", "close"),
                events);
        assertTrue(Golden.sqnr(Golden.clip(), clip.frames()) > 100);
        assertEquals(2, clip.runs().get(2).npuNodes());
        assertNull(clip.runs().get(2).whyNotNpu());
    }

    @Test
    public void whatTheNpuRefusesRunsOnTheCpuIfBothWereAsked() throws Exception {
        for (String where : List.of("load unet", "run unet")) {
            TestNpu npu = new TestNpu();
            npu.failures.put(where, Problem.NPU_REFUSED);
            Clip clip = generate(pipeline(Runtimes.of(cpu, npu)), Runtimes.Asked.AUTO);
            assertEquals(List.of(Backend.NPU, Backend.NPU, Backend.CPU, Backend.NPU), backends(clip));
            assertEquals(Problem.NPU_REFUSED, clip.runs().get(2).whyNotNpu().problem());
            assertTrue(Golden.sqnr(Golden.clip(), clip.frames()) > 100);
            Golden.assertFails(
                    Problem.NPU_REFUSED, () -> generate(pipeline(Runtimes.of(cpu, npu)), Runtimes.Asked.NPU));
        }
    }

    @Test
    public void aCallThatFailsOnTheNpuIsRepeatedOnceInANewSession() throws Exception {
        TestNpu npu = new TestNpu();
        npu.failures.put("run unet", Problem.RUN_FAILED);
        npu.failuresLeft = 1;
        Clip clip = generate(pipeline(Runtimes.of(cpu, npu)), Runtimes.Asked.AUTO);
        assertEquals(List.of(Backend.NPU, Backend.NPU, Backend.NPU, Backend.NPU), backends(clip));
        assertNull(clip.runs().get(2).whyNotNpu());
        assertEquals(2, events.stream().filter("load unet part0"::equals).count());
        assertTrue(Golden.sqnr(Golden.clip(), clip.frames()) > 100);
    }

    @Test
    public void aComponentThatFailsTwiceOnTheNpuRunsOnTheCpu() throws Exception {
        TestNpu npu = new TestNpu();
        npu.failures.put("run unet", Problem.RUN_FAILED);
        Clip clip = generate(pipeline(Runtimes.of(cpu, npu)), Runtimes.Asked.AUTO);
        assertEquals(List.of(Backend.NPU, Backend.NPU, Backend.CPU, Backend.NPU), backends(clip));
        MobileVdException why = clip.runs().get(2).whyNotNpu();
        assertEquals(Problem.NPU_RUN_FAILED, why.problem());
        assertEquals(List.of("run unet", "because"), why.arguments());
        assertEquals(2, events.stream().filter("load unet part0"::equals).count());
        assertTrue(Golden.sqnr(Golden.clip(), clip.frames()) > 100);
        Golden.assertFails(
                Problem.RUN_FAILED, () -> generate(pipeline(Runtimes.of(cpu, npu)), Runtimes.Asked.NPU));
    }

    @Test
    public void nanFromTheNpuIsNoClip() throws Exception {
        TestNpu npu = new TestNpu();
        npu.broken = "unet";
        Clip clip = generate(pipeline(Runtimes.of(cpu, npu)), Runtimes.Asked.AUTO);
        assertEquals(List.of(Backend.NPU, Backend.NPU, Backend.CPU, Backend.NPU), backends(clip));
        assertEquals(Problem.NPU_NOT_FINITE, clip.runs().get(2).whyNotNpu().problem());
        assertTrue(Golden.sqnr(Golden.clip(), clip.frames()) > 100);
    }

    @Test
    public void otherFailuresDoNotTurnToTheCpu() {
        TestNpu npu = new TestNpu();
        npu.failures.put("load unet", Problem.MEMORY_RAN_OUT);
        Golden.assertFails(
                Problem.MEMORY_RAN_OUT, () -> generate(pipeline(Runtimes.of(cpu, npu)), Runtimes.Asked.AUTO));
        assertEquals("load unet part0", events.get(events.size() - 1));
        TestNpu failingCpu =
                new TestNpu() {
                    @Override
                    public Backend backend() {
                        return Backend.CPU;
                    }
                };
        failingCpu.failures.put("run unet", Problem.RUN_FAILED);
        Runtimes onlyCpu = Runtimes.withoutNpu(failingCpu, new MobileVdException(Problem.NPU_NOT_IN_APP));
        Golden.assertFails(Problem.RUN_FAILED, () -> generate(pipeline(onlyCpu), Runtimes.Asked.AUTO));
        assertEquals("close", events.get(events.size() - 1));
    }

    @Test
    public void progressDoesNotFallWhenAComponentIsRepeated() throws Exception {
        TestNpu npu = new TestNpu();
        npu.failures.put("run unet", Problem.RUN_FAILED);
        List<Double> fractions = new ArrayList<>();
        pipeline(Runtimes.of(cpu, npu))
                .generate(
                        Golden.picture(), 7, Runtimes.Asked.AUTO,
                        new Pipeline.Listener() {
                            @Override
                            public void at(String component, int index, int count, Backend backend,
                                    Pipeline.Stage stage, int call, double fraction) {
                                fractions.add(fraction);
                            }
                        },
                        Golden.NEVER);
        List<Double> sorted = new ArrayList<>(fractions);
        sorted.sort(null);
        assertEquals(sorted, fractions);
    }

    @Test
    public void aSessionForTheNpuThatRanOnTheCpuIsFoundOut() throws Exception {
        Path model = artifact.root().resolve("image_encoder/model.onnx");
        try (OrtSession.SessionOptions options = new OrtSession.SessionOptions();
                Runner runner = OrtRunner.load("image_encoder", Backend.NPU, model, scratch, options, Map.of());
                Tensor image = Tensor.of(Golden.picture(), 1, 3, 16, 24)) {
            MobileVdException error =
                    Golden.assertFails(
                            Problem.NPU_PLACEMENT, () -> runner.run(Map.of("image", image), Golden.NEVER));
            assertEquals(List.of("image_encoder", 0, 2), error.arguments());
        }
    }

    @Test
    public void lowMemoryIsSaidInNumbersBeforeAnythingIsLoaded() throws Exception {
        long largest =
                artifact.manifest().components().stream()
                        .flatMap(component -> component.npu().get(0).parts().stream())
                        .mapToLong(part -> part.files().get("context").bytes())
                        .max()
                        .getAsLong();
        MemoryInfo little = () -> new MemoryInfo.Snapshot(2 * largest - 1, 1 << 20);
        Pipeline pipeline =
                new Pipeline(artifact, Runtimes.of(cpu, new TestNpu()), little, new RunTrace(traceFile));
        MobileVdException error =
                Golden.assertFails(Problem.NO_MEMORY, () -> generate(pipeline, Runtimes.Asked.NPU));
        assertEquals(new ByteSize(2 * largest), error.arguments().get(1));
        assertEquals(new ByteSize(2 * largest - 1), error.arguments().get(2));
        assertEquals(List.of(), events);
        MemoryInfo enough = () -> new MemoryInfo.Snapshot(2 * largest, 1 << 20);
        generate(
                new Pipeline(artifact, Runtimes.of(cpu, new TestNpu()), enough, new RunTrace(traceFile)),
                Runtimes.Asked.NPU);
    }

    @Test
    public void memoryIsLookedAtAgainBeforeEveryLoad() {
        // Another app allocates it while the first components run.
        MemoryInfo shrinking =
                () -> new MemoryInfo.Snapshot(events.contains("load unet part0") ? 3 : 1 << 30, 1 << 30);
        Pipeline pipeline =
                new Pipeline(artifact, Runtimes.of(cpu, new TestNpu()), shrinking, new RunTrace(traceFile));
        MobileVdException error =
                Golden.assertFails(Problem.NO_MEMORY, () -> generate(pipeline, Runtimes.Asked.NPU));
        assertEquals("unet", error.arguments().get(0));
        assertEquals("close", events.get(events.size() - 1));
    }

    @Test
    public void whenTheHeapIsFullThatIsSaid() {
        TestNpu greedy =
                new TestNpu() {
                    @Override
                    public Runner load(Artifact artifact, Manifest.Component component, Manifest.Part part) {
                        throw new OutOfMemoryError("by the test");
                    }
                };
        Runtimes runtimes = Runtimes.withoutNpu(greedy, new MobileVdException(Problem.NPU_NOT_IN_APP));
        MobileVdException error =
                Golden.assertFails(
                        Problem.MEMORY_RAN_OUT, () -> generate(pipeline(runtimes), Runtimes.Asked.CPU));
        assertEquals(List.of("image_encoder"), error.arguments());
    }

    @Test
    public void cancelsBetweenAnyTwoSteps() throws Exception {
        List<String> steps = new ArrayList<>();
        Pipeline.Listener all =
                new Pipeline.Listener() {
                    @Override
                    public void at(String component, int index, int count, Backend backend, Pipeline.Stage stage,
                            int call, double fraction) {
                        steps.add(component + " " + stage);
                    }
                };
        onCpu().generate(Golden.picture(), 7, Runtimes.Asked.CPU, all, Golden.NEVER);
        assertEquals(12, steps.size());
        for (String step : steps) {
            Cancellation cancellation = new Cancellation();
            List<String> after = new ArrayList<>();
            Pipeline.Listener cancelling =
                    new Pipeline.Listener() {
                        @Override
                        public void at(String component, int index, int count, Backend backend,
                                Pipeline.Stage stage, int call, double fraction) {
                            if (cancellation.isCancelled()) {
                                after.add(component + " " + stage);
                            }
                            if (step.equals(component + " " + stage)) {
                                cancellation.cancel();
                            }
                        }
                    };
            if (step.equals("decoder CLOSE")) {
                continue; // the clip is complete
            }
            Golden.assertFails(
                    Problem.CANCELLED,
                    () -> onCpu().generate(Golden.picture(), 7, Runtimes.Asked.CPU, cancelling, cancellation));
            assertEquals(List.of(), after);
            assertTrue(Files.notExists(traceFile));
        }
    }

    @Test
    public void progressNeverFallsAndKnowsItsComponent() throws Exception {
        List<Double> fractions = new ArrayList<>();
        List<String> finished = new ArrayList<>();
        onCpu().generate(
                Golden.picture(), 7, Runtimes.Asked.CPU,
                new Pipeline.Listener() {
                    @Override
                    public void at(String component, int index, int count, Backend backend, Pipeline.Stage stage,
                            int call, double fraction) {
                        assertEquals(NAMES.get(index), component);
                        assertEquals(4, count);
                        assertTrue(fractions.isEmpty() || fraction >= fractions.get(fractions.size() - 1));
                        fractions.add(fraction);
                    }

                    @Override
                    public void finished(ComponentRun run) {
                        finished.add(run.component());
                    }
                },
                Golden.NEVER);
        assertEquals(0, fractions.get(0), 0);
        assertEquals(1, fractions.get(fractions.size() - 1), 1e-9);
        assertEquals(NAMES, finished);
    }

    @Test
    public void progressIsByTheTimesOfAnEarlierRun() throws Exception {
        Map<String, Double> ms = Map.of("image_encoder", 10.0, "vae_encoder", 20.0, "unet", 30.0, "decoder", 40.0);
        assertEquals(List.of(0.0, 0.1, 0.3, 0.6), loads(ms));
        List<Double> first = loads(Map.of("unet", 5.0));
        assertTrue("two of four are a quarter or more: " + first, first.get(2) >= 0.25 && first.get(2) < 0.75);
    }

    /** Progress at the load of each component. */
    private List<Double> loads(Map<String, Double> measuredMs) throws Exception {
        List<Double> found = new ArrayList<>();
        Runtimes runtimes = Runtimes.withoutNpu(cpu, new MobileVdException(Problem.NPU_NOT_IN_APP));
        new Pipeline(artifact, runtimes, Golden.PLENTY, new RunTrace(traceFile), measuredMs)
                .generate(
                        Golden.picture(), 7, Runtimes.Asked.CPU,
                        new Pipeline.Listener() {
                            @Override
                            public void at(String component, int index, int count, Backend backend,
                                    Pipeline.Stage stage, int call, double fraction) {
                                if (stage == Pipeline.Stage.LOAD) {
                                    found.add(Math.round(fraction * 1000) / 1000.0);
                                }
                            }
                        },
                        Golden.NEVER);
        return found;
    }

    @Test
    public void aModelThatWasDamagedMeanwhileIsNotLoaded() throws Exception {
        Path model = artifact.root().resolve("unet/model.onnx");
        byte[] content = Files.readAllBytes(model);
        content[content.length / 2] ^= 1;
        Files.write(model, content);
        MobileVdException error =
                Golden.assertFails(Problem.FILE_DAMAGED, () -> generate(onCpu(), Runtimes.Asked.CPU));
        assertEquals(List.of("unet/model.onnx"), error.arguments());
    }

    @Test
    public void aModelThatIsNoModelIsRefusedReadably() throws Exception {
        byte[] nonsense = "no model".getBytes(java.nio.charset.StandardCharsets.US_ASCII);
        Manifest.FileEntry entry = artifact.manifest().component("unet").files().get("model");
        Files.write(artifact.path(entry), nonsense);
        Golden.rewriteManifest(artifact.root(), entry.sha256(), Sha256.of(nonsense));
        Golden.rewriteManifest(artifact.root(), "\"bytes\": " + entry.bytes(), "\"bytes\": " + nonsense.length);
        artifact = Artifact.open(artifact.root());
        MobileVdException error =
                Golden.assertFails(Problem.MODEL_REFUSED, () -> generate(onCpu(), Runtimes.Asked.CPU));
        assertEquals("unet", error.arguments().get(0));
    }

    @Test
    public void anOutputThatTheManifestDoesNotKnowIsRefused() throws Exception {
        Golden.rewriteManifest(artifact.root(), "\"latents\"", "\"lateness\"");
        artifact = Artifact.open(artifact.root());
        Golden.assertFails(Problem.OUTPUT_UNEXPECTED, () -> generate(onCpu(), Runtimes.Asked.CPU));
    }

    @Test
    public void picturesThatDoNotFitAreRefused() throws Exception {
        Golden.assertFails(
                Problem.IMAGE_INVALID,
                () -> onCpu().generate(new float[5], 7, Runtimes.Asked.CPU, Pipeline.Listener.NONE, Golden.NEVER));
        for (float value : new float[] {1.01f, -2, Float.NaN}) {
            float[] picture = new float[3 * 16 * 24];
            picture[17] = value;
            Golden.assertFails(
                    Problem.IMAGE_INVALID,
                    () -> onCpu().generate(picture, 7, Runtimes.Asked.CPU, Pipeline.Listener.NONE, Golden.NEVER));
        }
    }

    @Test
    public void repeatsOnlyWhatIsMeasured() throws Exception {
        Pipeline.Request request =
                new Pipeline.Request(Golden.picture(), 7, Runtimes.Asked.NPU, 2, 3, Set.of("unet"));
        Clip clip =
                pipeline(Runtimes.of(cpu, new TestNpu())).run(request, Pipeline.Listener.NONE, Golden.NEVER);
        assertEquals(
                Arrays.asList(1, 1, 3, 1),
                clip.runs().stream().map(run -> run.ms().size()).collect(Collectors.toList()));
        assertEquals(5, events.stream().filter("run [image_latents, moved]"::equals).count());
        float[] once = onCpu(onCpu(), Golden.picture(), 7);
        assertTrue(Golden.sqnr(once, clip.frames()) > 100);
    }

    @Test
    public void aValueIsCopiedOnce() {
        float[] values = new float[1 << 20];
        Arrays.fill(values, 0.25f);
        try (Tensor tensor = Tensor.of(values, 1, values.length)) {
            var threads = (com.sun.management.ThreadMXBean) ManagementFactory.getThreadMXBean();
            tensor.toArray(); // loads classes
            long before = threads.getCurrentThreadAllocatedBytes();
            float[] copy = tensor.toArray();
            long allocated = threads.getCurrentThreadAllocatedBytes() - before;
            assertArrayEquals(values, copy, 0);
            assertTrue(allocated + " bytes for " + 4 * values.length, allocated < 5L * values.length);
        }
    }

    @Test
    public void leavesNoFiles() throws Exception {
        generate(onCpu(), Runtimes.Asked.CPU);
        assertEquals(List.of(), Golden.files(scratch));
        assertTrue(Files.notExists(traceFile));
    }

    @Test
    public void theTraceNamesEveryNativeCallWhileItRuns() throws Exception {
        List<String> seen = new ArrayList<>();
        TestNpu npu = new TestNpu();
        Pipeline.Listener reading =
                new Pipeline.Listener() {
                    @Override
                    public void at(String component, int index, int count, Backend backend, Pipeline.Stage stage,
                            int call, double fraction) {
                        try {
                            byte[] kept = Files.readAllBytes(traceFile);
                            RunTrace.Step step = new RunTrace(traceFile).takePrevious();
                            Files.write(traceFile, kept);
                            seen.add(step.component() + " " + step.part() + "/" + step.parts() + " " + step.stage());
                            assertEquals("npu", step.backend());
                            assertEquals("tiny", step.artifact());
                        } catch (IOException error) {
                            throw new UncheckedIOException(error);
                        }
                    }
                };
        pipeline(Runtimes.of(cpu, npu)).generate(Golden.picture(), 7, Runtimes.Asked.NPU, reading, Golden.NEVER);
        assertEquals(15, seen.size());
        assertEquals(
                List.of("unet 1/2 load", "unet 1/2 run", "unet 1/2 close", "unet 2/2 load"), seen.subList(6, 10));
    }

    @Test
    public void valuesOfAFailedRunAreGone() {
        // Closing a value twice would throw.
        TestNpu npu = new TestNpu();
        npu.failures.put("run decoder", Problem.RUN_FAILED);
        for (int i = 0; i < 20; i++) {
            Golden.assertFails(
                    Problem.RUN_FAILED, () -> generate(pipeline(Runtimes.of(cpu, npu)), Runtimes.Asked.NPU));
        }
    }

    @Test
    public void choosesForTheScreenWhatTheRunWillDo() throws Exception {
        Manifest.Component unet = artifact.manifest().component("unet");
        TestNpu npu = new TestNpu();
        assertSame(npu, Runtimes.of(cpu, npu).choose(unet, Runtimes.Asked.AUTO).runtime());
        assertSame(cpu, Runtimes.of(cpu, npu).choose(unet, Runtimes.Asked.CPU).runtime());
        Runtimes without = Runtimes.withoutNpu(cpu, new MobileVdException(Problem.NPU_NOT_FOUND));
        assertNotNull(without.choose(unet, Runtimes.Asked.AUTO).whyNotNpu());
        assertNull(without.qnn());
        assertEquals("1.29.0", without.onnxruntime());
        assertArrayEquals(
                new Object[] {"auto", "npu", "cpu"},
                Arrays.stream(Runtimes.Asked.values()).map(Runtimes.Asked::id).toArray());
        assertEquals(Runtimes.Asked.NPU, Runtimes.Asked.of("npu"));
        Golden.assertFails(Problem.BENCHMARK_INVALID, () -> Runtimes.Asked.of("gpu"));
    }
}
