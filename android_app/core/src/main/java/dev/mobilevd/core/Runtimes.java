package dev.mobilevd.core;

import ai.onnxruntime.OrtEnvironment;

/** What this device can run components on, and the choice between them. */
public final class Runtimes {
    /** What a person asks for: the NPU where it works and else the CPU, or one of them and no other. */
    public enum Asked {
        AUTO,
        NPU,
        CPU;

        /** As it stands in benchmark files and intents: "auto", "npu" or "cpu". */
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

    /** The runtime for a component; {@code whyNotNpu} is null where it is the NPU, or was not asked for. */
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

    /** Only the CPU works; {@code whyNoNpu} is an NPU_ problem that says why. */
    public static Runtimes withoutNpu(ComponentRuntime cpu, MobileVdException whyNoNpu) {
        return new Runtimes(cpu, null, whyNoNpu);
    }

    /** Why no component can run on the NPU of this device; null if it has one that works. */
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
     * Choose for one component. A run may still end on the CPU, if the NPU then refuses to load it.
     *
     * @throws MobileVdException the NPU_ problem, where only the NPU was asked for
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
