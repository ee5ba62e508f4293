package dev.mobilevd.core;

import java.util.List;

/**
 * The run of one component.
 *
 * @param backend the backend that it ran on
 * @param npuNodes nodes that ran on the NPU, according to the runtime's profile
 * @param cpuNodes nodes that did not
 * @param loadMs time to create the sessions of all parts, without the check of digests
 * @param ms time of each measured call: all parts, including copies of inputs and outputs
 * @param peakBytes peak resident memory of the process; null if the system does not report it
 * @param whyNotNpu why it ran on the CPU; null if it ran on the NPU, or if only the CPU was requested
 */
public record ComponentRun(
        String component,
        Backend backend,
        int npuNodes,
        int cpuNodes,
        double loadMs,
        List<Double> ms,
        Long peakBytes,
        MobileVdException whyNotNpu) {}
