package dev.mobilevd.core;

import java.util.List;

/** Loads components on one backend. */
public interface ComponentRuntime {
    /** The backend. */
    Backend backend();

    /**
     * The parts of a component, in the order in which they must be loaded and run.
     *
     * @throws MobileVdException an NPU_ problem if this runtime cannot run it
     */
    List<Manifest.Part> parts(Manifest.Component component) throws MobileVdException;

    /** Peak memory of loading {@code part} in bytes, without the values that it computes. */
    long memoryBytes(Manifest.Part part);

    /**
     * Load one part, whose files were verified.
     *
     * @throws MobileVdException {@link Problem#MODEL_REFUSED}, {@link Problem#NPU_REFUSED},
     *     {@link Problem#MEMORY_RAN_OUT}
     */
    Runner load(Artifact artifact, Manifest.Component component, Manifest.Part part) throws MobileVdException;
}
