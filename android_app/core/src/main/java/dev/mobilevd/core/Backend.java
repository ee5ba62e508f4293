package dev.mobilevd.core;

/** Where a component runs. */
public enum Backend {
    /** Hexagon, by a QNN context binary. */
    NPU,
    /** ONNX Runtime's CPU kernels, by the float model. */
    CPU;

    /** As it stands in benchmark files and intents: "npu" or "cpu". */
    public String id() {
        return this == NPU ? "npu" : "cpu";
    }
}
