package dev.mobilevd.core;

import ai.onnxruntime.OrtEnvironment;

/** The runtimes of this device, and the choice between them. */
public final class Runtimes {
    /** The requested backend: AUTO is the NPU if it works, else the CPU. */
    public enum Asked {
        AUTO,
        NPU,
        CPU;

        /** Its name in benchmark files and intents: "auto", "npu" or "cpu". */
        public String id() {
            return this == AUTO ? "auto" : this == NPU ? "npu" : "cpu";
        }

        /** @throws MobileVdException {@link Problem#BENCHMARK_INVALID} for any other word */
        public static Asked of(String id) throws MobileVdException {
            for (Asked asked : values()) {
                if (asked.id().equals(id)) {
                    return asked;
                }
            }
            throw new MobileVdException(Problem.BENCHMARK_INVALID, "the backend is auto, npu or cpu, not " + id);
        }
    }

    /** The runtime of a component; {@code whyNotNpu} is null if it is the NPU, or if the CPU was requested. */
    public record Choice(ComponentRuntime runtime, MobileVdException whyNotNpu) {}

    private final ComponentRuntime cpu;
    private final ComponentRuntime npu;
    private final MobileVdException whyNoNpu;

    private Runtimes(ComponentRuntime cpu, ComponentRuntime npu, MobileVdException whyNoNpu) {
        this.cpu = cpu;
        this.npu = npu;
        this.whyNoNpu = whyNoNpu;
    }

    /** Both work. */
    public static Runtimes of(ComponentRuntime cpu, ComponentRuntime npu) {
        return new Runtimes(cpu, npu, null);
    }

    /** Only the CPU works; {@code whyNoNpu} is the NPU_ problem. */
    public static Runtimes withoutNpu(ComponentRuntime cpu, MobileVdException whyNoNpu) {
        return new Runtimes(cpu, null, whyNoNpu);
    }

    /** Why this device has no usable NPU; null if it has one. */
    public MobileVdException whyNoNpu() {
        return whyNoNpu;
    }

    /** Version of ONNX Runtime. */
    public String onnxruntime() {
        return OrtEnvironment.getEnvironment().getVersion();
    }

    /** Version of the QNN libraries; null without them. */
    public SdkVersion qnn() {
        return npu instanceof NpuRuntime runtime ? runtime.sdk() : null;
    }

    /**
     * Choose the runtime of one component. If the NPU then fails to load it, the run still uses the CPU.
     *
     * @throws MobileVdException the NPU_ problem, if only the NPU was requested
     */
    public Choice choose(Manifest.Component component, Asked asked) throws MobileVdException {
        if (asked == Asked.CPU) {
            return onCpu(null);
        }
        try {
            if (npu == null) {
                throw whyNoNpu;
            }
            npu.parts(component);
            return new Choice(npu, null);
        } catch (MobileVdException problem) {
            if (asked == Asked.NPU || !problem.problem().isNpu()) {
                throw problem;
            }
            return onCpu(problem);
        }
    }

    Choice onCpu(MobileVdException whyNotNpu) {
        return new Choice(cpu, whyNotNpu);
    }
}
