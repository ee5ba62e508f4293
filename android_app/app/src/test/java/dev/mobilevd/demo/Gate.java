package dev.mobilevd.demo;

import dev.mobilevd.core.Artifact;
import dev.mobilevd.core.Backend;
import dev.mobilevd.core.ComponentRuntime;
import dev.mobilevd.core.CpuRuntime;
import dev.mobilevd.core.Manifest;
import dev.mobilevd.core.MobileVdException;
import dev.mobilevd.core.Problem;
import dev.mobilevd.core.Runner;
import dev.mobilevd.core.Runtimes;
import java.nio.file.Path;
import java.util.List;

/** ONNX Runtime on the CPU. Before it loads one component, it waits until the test opens it. */
final class Gate implements ComponentRuntime {
    private final CpuRuntime cpu = new CpuRuntime(Path.of(System.getProperty("java.io.tmpdir")));
    private final Door door = new Door();
    private final String component;

    Gate(String component) {
        this.component = component;
    }

    void open() {
        door.open();
    }

    /** Whether the run waits before the component. Its files were checked. */
    boolean isReached() {
        return door.isReached();
    }

    Runtimes runtimes() {
        return Runtimes.withoutNpu(this, new MobileVdException(Problem.NPU_NOT_IN_APP));
    }

    @Override
    public Backend backend() {
        return Backend.CPU;
    }

    @Override
    public List<Manifest.Part> parts(Manifest.Component component) {
        return cpu.parts(component);
    }

    @Override
    public long memoryBytes(Manifest.Part part) {
        return cpu.memoryBytes(part);
    }

    @Override
    public Runner load(Artifact artifact, Manifest.Component which, Manifest.Part part) throws MobileVdException {
        if (which.name().equals(component)) {
            door.pass();
        }
        return cpu.load(artifact, which, part);
    }
}
