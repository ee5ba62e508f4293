package dev.mobilevd.demo;

import dev.mobilevd.core.Artifact;
import dev.mobilevd.core.Backend;
import dev.mobilevd.core.ComponentRuntime;
import dev.mobilevd.core.CpuRuntime;
import dev.mobilevd.core.Manifest;
import dev.mobilevd.core.MobileVdException;
import dev.mobilevd.core.Runner;
import dev.mobilevd.core.Runtimes;
import java.nio.file.Path;
import java.util.List;

/** An NPU that runs no component, for one reason. */
record NoNpu(MobileVdException why) implements ComponentRuntime {
    /** Runtimes with this NPU and the real CPU. */
    Runtimes runtimes() {
        return Runtimes.of(new CpuRuntime(Path.of(System.getProperty("java.io.tmpdir"))), this);
    }

    @Override
    public Backend backend() {
        return Backend.NPU;
    }

    @Override
    public List<Manifest.Part> parts(Manifest.Component component) throws MobileVdException {
        throw why;
    }

    @Override
    public long memoryBytes(Manifest.Part part) {
        throw new AssertionError();
    }

    @Override
    public Runner load(Artifact artifact, Manifest.Component component, Manifest.Part part) {
        throw new AssertionError();
    }
}
