package dev.mobilevd.core;

/** Where a component runs. */
public enum Backend {
    /** The Hexagon NPU, with a QNN context binary. */
    NPU,
    /** ONNX Runtime's CPU kernels, with the float model. */
    CPU;

    /** Its name in benchmark files and intents: "npu" or "cpu". */
    public String id() {
        return this == NPU ? "npu" : "cpu";
    }
}
