package dev.mobilevd.core;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertTrue;

import org.junit.Before;
import org.junit.Rule;
import org.junit.Test;
import org.junit.rules.TemporaryFolder;

/** The demo's float artifact on ONNX Runtime for the desktop, compared with Python. */
public class DemoTest {
    @Rule public final TemporaryFolder temporary = new TemporaryFolder();
    private Artifact artifact;
    private Pipeline pipeline;

    @Before
    public void open() throws Exception {
        artifact = Artifact.open(Reference.folder("mobilevd.artifact"));
        Runtimes runtimes =
                Runtimes.withoutNpu(
                        new CpuRuntime(temporary.newFolder("scratch").toPath()),
                        new MobileVdException(Problem.NPU_NOT_IN_APP));
        RunTrace trace = new RunTrace(temporary.getRoot().toPath().resolve("trace.json"));
        pipeline = new Pipeline(artifact, runtimes, Golden.PLENTY, trace);
    }

    @Test
    public void makesPythonsClipOfEveryPicture() throws Exception {
        Reference reference = Reference.of("mobilevd.reference");
        assertEquals(2, reference.pictures.size());
        for (String picture : reference.pictures) {
            Clip clip =
                    pipeline.generate(
                            reference.image(picture, artifact.manifest().pipeline()), reference.seed,
                            Runtimes.Asked.AUTO, Pipeline.Listener.NONE, Golden.NEVER);
            reference.assertSame(picture, clip);
            for (ComponentRun run : clip.runs()) {
                assertEquals(Backend.CPU, run.backend());
                System.out.printf(
                        "  %s: load %.0f ms, run %.0f ms, %d nodes, peak %s%n", run.component(), run.loadMs(),
                        run.ms().get(0), run.cpuNodes(), new ByteSize(run.peakBytes()));
            }
        }
    }

    @Test
    public void cancelsInsideOfALongCall() throws Exception {
        Manifest.PipelineSpec spec = artifact.manifest().pipeline();
        float[] grey = new float[3 * spec.height() * spec.width()];
        double[] whole = new double[1];
        Pipeline.Listener timing =
                new Pipeline.Listener() {
                    @Override
                    public void finished(ComponentRun run) {
                        whole[0] = Math.max(whole[0], run.ms().get(0));
                    }
                };
        pipeline.generate(grey, 7, Runtimes.Asked.CPU, timing, Golden.NEVER);

        Cancellation cancellation = new Cancellation();
        long[] cancelled = new long[1];
        Pipeline.Listener cancelling =
                new Pipeline.Listener() {
                    @Override
                    public void at(String component, int index, int count, Backend backend, Pipeline.Stage stage,
                            int call, double fraction) {
                        if (component.equals("unet") && stage == Pipeline.Stage.RUN) {
                            new Thread(
                                            () -> {
                                                sleep((long) (whole[0] / 5));
                                                cancelled[0] = System.nanoTime();
                                                cancellation.cancel();
                                            })
                                    .start();
                        }
                    }
                };
        Golden.assertFails(
                Problem.CANCELLED,
                () -> pipeline.generate(grey, 7, Runtimes.Asked.CPU, cancelling, cancellation));
        double took = (System.nanoTime() - cancelled[0]) / 1e6;
        System.out.printf("cancelled within %.0f ms of a call of %.0f ms%n", took, whole[0]);
        assertTrue(took + " of " + whole[0] + " ms", took < whole[0] / 2);
    }

    private static void sleep(long ms) {
        try {
            Thread.sleep(ms);
        } catch (InterruptedException error) {
            throw new IllegalStateException(error);
        }
    }
}
