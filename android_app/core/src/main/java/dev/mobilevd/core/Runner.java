package dev.mobilevd.core;

import java.util.Map;

/** A loaded component, or a part of one. */
public interface Runner extends AutoCloseable {
    /** Nodes of the graph by the place where the runtime's profile says that they ran. */
    record Placement(int npuNodes, int cpuNodes) {}

    /**
     * Map inputs by name to outputs by name. The inputs stay the caller's, the outputs become the caller's.
     *
     * @throws MobileVdException {@link Problem#RUN_FAILED}, {@link Problem#NPU_PLACEMENT},
     *     {@link Problem#MEMORY_RAN_OUT}, {@link Problem#CANCELLED}
     */
    Map<String, Tensor> run(Map<String, Tensor> inputs, Cancellation cancellation) throws MobileVdException;

    /** Where the first run ran; null before it. */
    Placement placement();

    /** Free its memory. */
    @Override
    void close();
}
