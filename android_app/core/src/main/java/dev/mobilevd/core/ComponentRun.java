package dev.mobilevd.core;

import java.util.List;

/**
 * How a component ran.
 *
 * @param backend where it really ran
 * @param npuNodes nodes of its graphs that the runtime's profile places on the NPU
 * @param cpuNodes nodes that it places elsewhere
 * @param loadMs from the files to ready sessions, all parts together, without the check of digests
 * @param ms of each call, all parts together, copies of inputs and outputs included; warm-up is left out
 * @param peakBytes highest resident memory of the process meanwhile; null where the system does not say
 * @param whyNotNpu null if it ran on the NPU, or if only the CPU was asked for
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
