package dev.mobilevd.core;

import java.math.BigInteger;

/**
 * Standard-normal noise, the same on every machine: "splitmix64-as241-v1".
 *
 * <p>The Python module noise.py has the specification with its sources; the numbers below refer to its steps. All
 * arithmetic is in IEEE doubles without fused operations or library functions, whose rounding could differ.
 */
public final class Noise {
    /** The generator's name in manifests. */
    public static final String GENERATOR = "splitmix64-as241-v1";

    private static final long GAMMA = 0x9E3779B97F4A7C15L;
    private static final long STREAMS = 1L << 32;

    private static final double[][] CENTRAL = {
        {
            2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
            13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608
        },
        {
            5226.495278852545925, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
            5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0
        }
    };
    private static final double[][] MIDDLE = {
        {
            7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
            3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734
        },
        {
            1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
            0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0
        }
    };
    private static final double[][] FAR = {
        {
            2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386, 0.026532189526576123093,
            0.29656057182850489123, 1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772
        },
        {
            2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4,
            0.0148753612908506148525, 0.13692988092273580531, 0.59983220655588793769, 1.0
        }
    };

    private Noise() {}

    /**
     * The first {@code count} elements of a stream, in row-major order of the tensor.
     *
     * @param seed any 64 bits, unsigned
     * @param stream in [0, 2^32)
     * @throws IllegalArgumentException for another stream
     */
    public static float[] unit(long seed, long stream, int count) {
        if (stream < 0 || stream >= STREAMS) {
            throw new IllegalArgumentException("noise stream " + stream);
        }
        long key = mix(mix(seed + GAMMA) + (stream + 1) * GAMMA); // 3
        float[] values = new float[count];
        for (int index = 0; index < count; index++) {
            long word = mix(key + (index + 1L) * GAMMA);
            double u = (2 * (word >>> 12) + 1) * 0x1p-53; // 4
            values[index] = (float) inverseNormal(u); // 9
        }
        return values;
    }

    /**
     * Parse a seed: a decimal integer from 0 to 2^64 - 1.
     *
     * @return its 64 bits; {@link Long#toUnsignedString(long)} is the inverse
     * @throws MobileVdException {@link Problem#SEED_INVALID}
     */
    public static long parseSeed(String text) throws MobileVdException {
        String trimmed = text.trim();
        if (trimmed.matches("[0-9]{1,30}")) {
            BigInteger value = new BigInteger(trimmed);
            if (value.bitLength() <= 64) {
                return value.longValue();
            }
        }
        throw new MobileVdException(Problem.SEED_INVALID, trimmed);
    }

    /** x with P(N(0, 1) <= x) = u, for u in (0, 1). */
    static double inverseNormal(double u) {
        double q = u - 0.5; // 5
        if (Math.abs(q) <= 0.425) {
            double r = 0.180625 - q * q;
            return q * horner(CENTRAL[0], r) / horner(CENTRAL[1], r);
        }
        double r = Math.sqrt(-log(q < 0 ? u : 1.0 - u)); // 6
        double[][] ratio = r <= 5 ? MIDDLE : FAR;
        double shifted = r <= 5 ? r - 1.6 : r - 5;
        double x = horner(ratio[0], shifted) / horner(ratio[1], shifted);
        return q < 0 ? -x : x;
    }

    private static long mix(long z) { // 2
        z = (z ^ (z >>> 30)) * 0xBF58476D1CE4E5B9L;
        z = (z ^ (z >>> 27)) * 0x94D049BB133111EBL;
        return z ^ (z >>> 31);
    }

    private static double horner(double[] coefficients, double r) { // 7
        double value = coefficients[0];
        for (int i = 1; i < coefficients.length; i++) {
            value = value * r;
            value = value + coefficients[i];
        }
        return value;
    }

    private static double log(double p) { // 8
        int exponent = Math.getExponent(p) + 1;
        double m = p * Double.longBitsToDouble((1023L - exponent) << 52); // exact: a power of two
        if (m < 0.7071067811865476) {
            m = m + m;
            exponent = exponent - 1;
        }
        double s = (m - 1) / (m + 1);
        double t = s * s;
        double value = 1.0 / 23;
        for (int k = 21; k >= 1; k -= 2) {
            value = value * t;
            value = value + 1.0 / k;
        }
        return exponent * 0.6931471805599453 + (2 * s) * value;
    }
}
