package dev.mobilevd.core;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertNull;
import static org.junit.Assert.assertTrue;

import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.Paths;
import java.util.ArrayList;
import java.util.List;
import org.junit.Before;
import org.junit.Rule;
import org.junit.Test;
import org.junit.rules.TemporaryFolder;

public class RunTraceTest {
    private static final int DIED = 86;

    @Rule public final TemporaryFolder temporary = new TemporaryFolder();
    private Path file;

    @Before
    public void make() {
        file = temporary.getRoot().toPath().resolve("trace.json");
    }

    @Test
    public void nothingRanNothingIsReported() {
        assertNull(new RunTrace(file).takePrevious());
    }

    @Test
    public void aStepIsReportedOnce() throws Exception {
        RunTrace.Step step = new RunTrace.Step("my-model", "unet", 2, 3, "npu", "load");
        new RunTrace(file).begin(step);
        assertEquals(step, new RunTrace(file).takePrevious());
        assertNull(new RunTrace(file).takePrevious());
    }

    @Test
    public void nonsenseIsNoCrash() throws Exception {
        for (String text : List.of("", "{", "{}", "[]", "{\"artifact\": 1}", "\0\0\0\0")) {
            Files.write(file, text.getBytes(java.nio.charset.StandardCharsets.UTF_8));
            assertNull(new RunTrace(file).takePrevious());
            assertTrue(Files.notExists(file));
        }
    }

    @Test
    public void aTraceThatCannotBeWrittenIsSaid() {
        RunTrace trace = new RunTrace(file.resolve("no/such/folder"));
        RunTrace.Step step = new RunTrace.Step("a", "unet", 1, 1, "cpu", "run");
        Golden.assertFails(Problem.NOT_WRITTEN, () -> trace.begin(step));
    }

    /** Another process runs the tiny artifact and halts like in a native crash, in and between calls. */
    @Test
    public void theNextStartKnowsWhereTheProcessDied() throws Exception {
        for (String where : List.of("vae_encoder LOAD", "unet RUN", "decoder CLOSE")) {
            List<String> command = new ArrayList<>();
            command.add(Paths.get(System.getProperty("java.home"), "bin", "java").toString());
            for (String name : List.of("mobilevd.root", "java.io.tmpdir")) {
                command.add("-D" + name + "=" + System.getProperty(name));
            }
            command.addAll(List.of("-cp", System.getProperty("java.class.path"), Dying.class.getName()));
            command.addAll(List.of(file.toString(), where, temporary.getRoot().toString()));
            Process process = new ProcessBuilder(command).inheritIO().start();
            assertEquals(DIED, process.waitFor());
            RunTrace.Step step = new RunTrace(file).takePrevious();
            assertEquals(where, step.component() + " " + step.stage().toUpperCase(java.util.Locale.ROOT));
            assertEquals("artifact", step.artifact());
            assertEquals("cpu", step.backend());
        }
        // The next run works.
        pipeline(file, temporary.getRoot().toPath())
                .generate(Golden.picture(), 7, Runtimes.Asked.CPU, Pipeline.Listener.NONE, Golden.NEVER);
        assertNull(new RunTrace(file).takePrevious());
    }

    private static Pipeline pipeline(Path file, Path scratch) throws MobileVdException {
        Runtimes runtimes =
                Runtimes.withoutNpu(new CpuRuntime(scratch), new MobileVdException(Problem.NPU_NOT_IN_APP));
        return new Pipeline(Artifact.open(Golden.ARTIFACT), runtimes, Golden.PLENTY, new RunTrace(file));
    }

    /** The other process. */
    public static final class Dying {
        /** Trace file, where to die, scratch folder. */
        public static void main(String[] arguments) throws Exception {
            Pipeline.Listener dying =
                    new Pipeline.Listener() {
                        @Override
                        public void at(String component, int index, int count, Backend backend,
                                Pipeline.Stage stage, int call, double fraction) {
                            if (arguments[1].equals(component + " " + stage)) {
                                Runtime.getRuntime().halt(DIED);
                            }
                        }
                    };
            pipeline(Paths.get(arguments[0]), Paths.get(arguments[2]))
                    .generate(Golden.picture(), 7, Runtimes.Asked.CPU, dying, Golden.NEVER);
        }
    }
}
