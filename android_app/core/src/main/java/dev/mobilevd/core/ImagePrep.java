package dev.mobilevd.core;

/**
 * Converts pictures to tensors and frames to pixels, bit-identical to the Python module media.py.
 *
 * <p>A picture is composited over white; its largest centred crop with the target's aspect ratio is resized by Lanczos
 * (a = 3) in Pillow's 8-bit fixed-point arithmetic; a value v becomes v / 127.5 - 1.
 * Source: Pillow, src/libImaging/Resample.c and AlphaComposite.c.
 */
public final class ImagePrep {
    private static final int CHANNELS = 3;
    private static final double LOBES = 3;
    // Weights have 22 fraction bits. That leaves 8 bits for the value and 2 for overshoot.
    private static final int WEIGHT_BITS = 22;
    private static final int ALPHA_BITS = 7;

    private ImagePrep() {}

    /**
     * Convert a picture to the input of a pipeline.
     *
     * @param argb pixels of a width x height picture, row by row, sRGB, 8 bits each, not premultiplied, upright
     * @return (1, 3, toHeight, toWidth) in [-1, 1], RGB
     * @throws MobileVdException {@link Problem#IMAGE_INVALID} if the size does not match the number of pixels
     */
    public static float[] prepare(int[] argb, int width, int height, int toWidth, int toHeight)
            throws MobileVdException {
        if (width < 1 || height < 1 || (long) width * height != argb.length) {
            throw new MobileVdException(
                    Problem.IMAGE_INVALID, argb.length + " pixels are not " + width + " x " + height);
        }
        byte[] rgb = fit(overWhite(argb), width, height, toWidth, toHeight);
        int plane = toWidth * toHeight;
        float[] values = new float[CHANNELS * plane];
        for (int pixel = 0; pixel < plane; pixel++) {
            for (int channel = 0; channel < CHANNELS; channel++) {
                int value = rgb[pixel * CHANNELS + channel] & 0xFF;
                values[channel * plane + pixel] = (float) (value / 127.5 - 1.0);
            }
        }
        return values;
    }

    /**
     * Convert one frame to pixels.
     *
     * @param frames (T, 3, height, width); x is clamped to [-1, 1] and becomes (x + 1) * 127.5, rounded half to even
     * @return pixels of frame {@code index}, row by row, opaque ARGB
     */
    public static int[] toArgb(float[] frames, int index, int width, int height) {
        int plane = width * height;
        int[] pixels = new int[plane];
        for (int pixel = 0; pixel < plane; pixel++) {
            int colour = 0xFF;
            for (int channel = 0; channel < CHANNELS; channel++) {
                colour = colour << 8 | toByte(frames[(index * CHANNELS + channel) * plane + pixel]);
            }
            pixels[pixel] = colour;
        }
        return pixels;
    }

    static int toByte(float x) {
        return (int) Math.rint((Math.max(-1.0, Math.min(1.0, x)) + 1.0) * 127.5);
    }

    private static byte[] overWhite(int[] argb) {
        byte[] rgb = new byte[argb.length * CHANNELS];
        for (int i = 0; i < argb.length; i++) {
            int alpha = argb[i] >>> 24;
            // Over opaque white the result is opaque. The two weights add up to 255 * 2^7.
            int weight = alpha << ALPHA_BITS;
            int white = (255 << ALPHA_BITS) - weight;
            for (int channel = 0; channel < CHANNELS; channel++) {
                int value = argb[i] >>> (16 - 8 * channel) & 0xFF;
                int sum = value * weight + 255 * white + (0x80 << ALPHA_BITS);
                rgb[i * CHANNELS + channel] = (byte) (((sum >>> 8) + sum) >>> 8 >>> ALPHA_BITS);
            }
        }
        return rgb;
    }

    /** Scale to cover and crop at the centre, in one step. Returns bytes (toHeight, toWidth, 3). */
    private static byte[] fit(byte[] rgb, int width, int height, int toWidth, int toHeight) {
        if (width == toWidth && height == toHeight) {
            return rgb;
        }
        double scale = Math.max((double) toWidth / width, (double) toHeight / height);
        double left = (width - toWidth / scale) / 2;
        double top = (height - toHeight / scale) / 2;
        // Pillow stores the box in single precision.
        float x0 = (float) Math.max(left, 0.0);
        float y0 = (float) Math.max(top, 0.0);
        float x1 = (float) Math.min(width - left, width);
        float y1 = (float) Math.min(height - top, height);
        boolean across = width != toWidth || x0 != 0 || x1 != toWidth;
        boolean down = height != toHeight || y0 != 0 || y1 != toHeight;
        Weights vertical = Weights.of(height, y0, y1, toHeight);
        byte[] pixels = rgb;
        int firstRow = 0;
        if (across) {
            firstRow = vertical.first[0];
            int rows = vertical.first[toHeight - 1] + vertical.count[toHeight - 1] - firstRow;
            pixels = resizeRows(rgb, width, firstRow, rows, Weights.of(width, x0, x1, toWidth));
        }
        return down ? resizeColumns(pixels, toWidth, firstRow, vertical) : pixels;
    }

    /** Resize {@code rows} rows from {@code firstRow} on. Returns bytes (rows, weights.size, 3). */
    private static byte[] resizeRows(byte[] rgb, int width, int firstRow, int rows, Weights weights) {
        byte[] made = new byte[rows * weights.size * CHANNELS];
        int at = 0;
        for (int y = 0; y < rows; y++) {
            int row = (firstRow + y) * width;
            for (int x = 0; x < weights.size; x++) {
                for (int channel = 0; channel < CHANNELS; channel++) {
                    made[at++] = weights.sum(x, rgb, (row + weights.first[x]) * CHANNELS + channel, CHANNELS);
                }
            }
        }
        return made;
    }

    /** Resize the columns of an image whose first row is {@code firstRow}. Returns bytes (weights.size, width, 3). */
    private static byte[] resizeColumns(byte[] rgb, int width, int firstRow, Weights weights) {
        int row = width * CHANNELS;
        byte[] made = new byte[weights.size * row];
        int at = 0;
        for (int y = 0; y < weights.size; y++) {
            for (int x = 0; x < row; x++) {
                made[at++] = weights.sum(y, rgb, (weights.first[y] - firstRow) * row + x, row);
            }
        }
        return made;
    }

    /** The inputs of each output position, and their weights in fixed point. */
    private static final class Weights {
        final int size;
        final int[] first;
        final int[] count;
        private final int[][] fixed;

        private Weights(int size) {
            this.size = size;
            first = new int[size];
            count = new int[size];
            fixed = new int[size][];
        }

        static Weights of(int inputs, float from, float to, int outputs) {
            Weights weights = new Weights(outputs);
            double scale = (double) (to - from) / outputs;
            double stretch = Math.max(scale, 1.0);
            double support = LOBES * stretch;
            for (int i = 0; i < outputs; i++) {
                double centre = from + (i + 0.5) * scale;
                int first = Math.max((int) (centre - support + 0.5), 0);
                int count = Math.min((int) (centre + support + 0.5), inputs) - first;
                double[] exact = new double[count];
                double sum = 0;
                for (int k = 0; k < count; k++) {
                    exact[k] = lanczos((k + first - centre + 0.5) * (1.0 / stretch));
                    sum += exact[k];
                }
                weights.first[i] = first;
                weights.count[i] = count;
                weights.fixed[i] = new int[count];
                for (int k = 0; k < count; k++) {
                    double share = sum == 0 ? exact[k] : exact[k] / sum;
                    weights.fixed[i][k] = (int) (share * (1 << WEIGHT_BITS) + (share < 0 ? -0.5 : 0.5));
                }
            }
            return weights;
        }

        /** The output {@code position} of a line of bytes; its first input is at {@code at}. */
        byte sum(int position, byte[] line, int at, int step) {
            int sum = 1 << (WEIGHT_BITS - 1);
            for (int weight : fixed[position]) {
                sum += (line[at] & 0xFF) * weight;
                at += step;
            }
            return (byte) Math.max(0, Math.min(255, sum >> WEIGHT_BITS));
        }

        private static double lanczos(double x) {
            return x >= -LOBES && x < LOBES ? sinc(x) * sinc(x / LOBES) : 0.0;
        }

        private static double sinc(double x) {
            // StrictMath returns the same bits on every machine.
            return x == 0 ? 1.0 : StrictMath.sin(x * Math.PI) / (x * Math.PI);
        }
    }
}
