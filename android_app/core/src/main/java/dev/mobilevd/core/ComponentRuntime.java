package dev.mobilevd.core;

import java.util.List;

/** Loads components on one backend. */
public interface ComponentRuntime {
    /** Where it runs them. */
    Backend backend();

    /**
     * What has to be loaded and run, one after the other, to run a component.
     *
     * @throws MobileVdException an NPU_ problem if this runtime cannot run it
     */
    List<Manifest.Part> parts(Manifest.Component component) throws MobileVdException;

    /** Bytes of memory that loading {@code part} takes at its peak, without the values that it computes. */
    long memoryBytes(Manifest.Part part);

    /**
     * Load one part; the files were verified.
     *
     * @throws MobileVdException {@link Problem#MODEL_REFUSED}, {@link Problem#NPU_REFUSED},
     *     {@link Problem#MEMORY_RAN_OUT}
     */
    Runner load(Artifact artifact, Manifest.Component component, Manifest.Part part) throws MobileVdException;
}
