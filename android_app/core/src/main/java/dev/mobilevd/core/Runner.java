package dev.mobilevd.core;

import java.util.Map;

/** A loaded component or part. */
public interface Runner extends AutoCloseable {
    /** Numbers of nodes by the processor that they ran on, according to the runtime's profile. */
    record Placement(int npuNodes, int cpuNodes) {}

    /**
     * Map inputs by name to outputs by name. The caller closes both.
     *
     * @throws MobileVdException {@link Problem#RUN_FAILED}, {@link Problem#NPU_PLACEMENT},
     *     {@link Problem#MEMORY_RAN_OUT}, {@link Problem#CANCELLED}
     */
    Map<String, Tensor> run(Map<String, Tensor> inputs, Cancellation cancellation) throws MobileVdException;

    /** The placement of the first run; null before it. */
    Placement placement();

    /** Free its memory. */
    @Override
    void close();
}
