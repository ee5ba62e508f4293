package dev.mobilevd.core;

import ai.onnxruntime.OnnxJavaType;
import ai.onnxruntime.OnnxTensor;
import ai.onnxruntime.OrtEnvironment;
import ai.onnxruntime.OrtException;
import ai.onnxruntime.TensorInfo;
import ai.onnxruntime.platform.Fp16Conversions;
import java.nio.FloatBuffer;
import java.nio.ShortBuffer;
import java.util.Arrays;

/** A value passed between components: float32 or float16 in the runtime's memory, until it is closed. */
public final class Tensor implements AutoCloseable {
    private final OnnxTensor value;

    Tensor(OnnxTensor value) {
        this.value = value;
    }

    /** A float32 tensor with a copy of {@code values}, in row-major order. */
    public static Tensor of(float[] values, long... shape) {
        return of(OnnxJavaType.FLOAT, values, shape);
    }

    private static Tensor of(OnnxJavaType type, float[] values, long... shape) {
        try {
            OrtEnvironment environment = OrtEnvironment.getEnvironment();
            if (type == OnnxJavaType.FLOAT16) {
                ShortBuffer halves = Fp16Conversions.convertFloatBufferToFp16Buffer(FloatBuffer.wrap(values));
                return new Tensor(OnnxTensor.createTensor(environment, halves, shape, type));
            }
            return new Tensor(OnnxTensor.createTensor(environment, FloatBuffer.wrap(values), shape));
        } catch (OrtException error) {
            throw new IllegalArgumentException(error); // shape and values do not match
        }
    }

    /** Its shape. */
    public long[] shape() {
        return info().getShape();
    }

    /** A copy of its values as float32, in row-major order. */
    public float[] toArray() {
        FloatBuffer copy = value.getFloatBuffer();
        // ONNX Runtime already copies. At 1024 x 576 and 14 frames, another copy would need 99 MB of heap.
        if (copy.hasArray() && copy.arrayOffset() == 0 && copy.array().length == copy.remaining()) {
            return copy.array();
        }
        float[] values = new float[copy.remaining()];
        copy.get(values);
        return values;
    }

    /** Whether no value is NaN or infinite. */
    boolean isFinite() {
        FloatBuffer values = value.getFloatBuffer();
        for (int i = values.position(); i < values.limit(); i++) {
            if (Float.isNaN(values.get(i)) || Float.isInfinite(values.get(i))) {
                return false;
            }
        }
        return true;
    }

    /** This value in the type that a session needs: itself, or a converted copy. */
    Tensor as(OnnxJavaType type) {
        return info().type == type ? this : of(type, toArray(), shape());
    }

    OnnxTensor value() {
        return value;
    }

    /** Free its memory. No method may be called after this. */
    @Override
    public void close() {
        value.close();
    }

    @Override
    public String toString() {
        return info().type + Arrays.toString(shape());
    }

    private TensorInfo info() {
        return value.getInfo();
    }
}
