package dev.mobilevd.demo;

import android.graphics.Bitmap;
import android.media.Image;
import android.media.MediaCodec;
import android.media.MediaCodecInfo;
import android.media.MediaFormat;
import android.media.MediaMuxer;
import android.os.SystemClock;
import dev.mobilevd.core.Cancellation;
import dev.mobilevd.core.MobileVdException;
import java.io.FileDescriptor;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.util.function.LongSupplier;

/** Encodes a clip as H.264 in MP4 with the phone's encoder. */
final class Mp4 implements Gallery.Encoder {
    // Encoders refuse very small pictures, and galleries blur them.
    private static final int LEAST_WIDTH = 640;
    private static final int LEAST_BITS_PER_SECOND = 2_000_000;
    private static final long TIMEOUT_US = 10_000;

    /** Closed in a try statement, where an exception of it does not hide the first one. */
    private interface Release extends AutoCloseable {
        @Override
        void close();
    }

    @Override
    @SuppressWarnings("try") // resources that are only released
    public void write(Result clip, FileDescriptor target, Cancellation cancellation)
            throws IOException, MobileVdException {
        int width = scaled(clip, clip.width());
        int height = scaled(clip, clip.height());
        MediaCodec codec = MediaCodec.createEncoderByType(MediaFormat.MIMETYPE_VIDEO_AVC);
        try (Release codecRelease = codec::release) {
            codec.configure(format(width, height, clip.fps()), null, null, MediaCodec.CONFIGURE_FLAG_ENCODE);
            codec.start();
            MediaMuxer muxer = new MediaMuxer(target, MediaMuxer.OutputFormat.MUXER_OUTPUT_MPEG_4);
            try (Release muxerRelease = muxer::release) {
                encode(clip, codec, muxer, width, height, new Watchdog(cancellation, SystemClock::elapsedRealtime));
                codec.stop();
                muxer.stop();
            }
        } catch (IllegalStateException error) { // MediaCodec.CodecException is one
            throw new IOException(error.toString(), error);
        }
    }

    /** Ends the encoding if it is cancelled, or if the encoder neither takes nor gives anything for 10 seconds. */
    static final class Watchdog {
        static final long PATIENCE_MS = 10_000;
        private final Cancellation cancellation;
        private final LongSupplier clock;
        private long last;

        /** {@code clock} returns milliseconds. */
        Watchdog(Cancellation cancellation, LongSupplier clock) {
            this.cancellation = cancellation;
            this.clock = clock;
            last = clock.getAsLong();
        }

        /** Call it in each iteration, with whether there was progress in it. */
        void check(boolean progress) throws IOException, MobileVdException {
            cancellation.check();
            if (progress) {
                last = clock.getAsLong();
            } else if (clock.getAsLong() - last > PATIENCE_MS) {
                throw new IOException("the encoder does not respond");
            }
        }
    }

    /** Upper bound of the file's size: the size without compression. */
    static long mostBytes(Result clip) {
        return (long) clip.frames().size() * scaled(clip, clip.width()) * scaled(clip, clip.height()) * 3 / 2;
    }

    private static int scaled(Result clip, int side) {
        int scale = Math.max(1, (LEAST_WIDTH + clip.width() - 1) / clip.width());
        return side * scale / 2 * 2; // H.264 with 4:2:0 needs even sizes
    }

    private static MediaFormat format(int width, int height, int fps) {
        MediaFormat format = MediaFormat.createVideoFormat(MediaFormat.MIMETYPE_VIDEO_AVC, width, height);
        format.setInteger(
                MediaFormat.KEY_COLOR_FORMAT, MediaCodecInfo.CodecCapabilities.COLOR_FormatYUV420Flexible);
        format.setInteger(MediaFormat.KEY_COLOR_STANDARD, MediaFormat.COLOR_STANDARD_BT601_NTSC);
        format.setInteger(MediaFormat.KEY_COLOR_RANGE, MediaFormat.COLOR_RANGE_LIMITED);
        format.setInteger(MediaFormat.KEY_COLOR_TRANSFER, MediaFormat.COLOR_TRANSFER_SDR_VIDEO);
        format.setInteger(MediaFormat.KEY_BIT_RATE, Math.max(LEAST_BITS_PER_SECOND, width * height * fps / 2));
        format.setInteger(MediaFormat.KEY_FRAME_RATE, fps);
        format.setInteger(MediaFormat.KEY_I_FRAME_INTERVAL, 1);
        return format;
    }

    private static void encode(
            Result clip, MediaCodec codec, MediaMuxer muxer, int width, int height, Watchdog watchdog)
            throws IOException, MobileVdException {
        MediaCodec.BufferInfo info = new MediaCodec.BufferInfo();
        int track = -1;
        int next = 0;
        for (boolean ended = false; !ended; ) {
            int input = next <= clip.frames().size() ? codec.dequeueInputBuffer(TIMEOUT_US) : -1;
            if (input >= 0) {
                long time = next * 1_000_000L / clip.fps();
                if (next < clip.frames().size()) {
                    fill(codec.getInputImage(input), clip.bitmap(next), width, height);
                    codec.queueInputBuffer(input, 0, width * height * 3 / 2, time, 0);
                } else {
                    codec.queueInputBuffer(input, 0, 0, time, MediaCodec.BUFFER_FLAG_END_OF_STREAM);
                }
                next++;
            }
            int output = codec.dequeueOutputBuffer(info, TIMEOUT_US);
            watchdog.check(input >= 0 || output >= 0);
            if (output == MediaCodec.INFO_OUTPUT_FORMAT_CHANGED) {
                track = muxer.addTrack(codec.getOutputFormat());
                muxer.start();
            } else if (output >= 0) {
                boolean header = (info.flags & MediaCodec.BUFFER_FLAG_CODEC_CONFIG) != 0;
                if (info.size > 0 && !header) {
                    muxer.writeSampleData(track, codec.getOutputBuffer(output), info);
                }
                codec.releaseOutputBuffer(output, false);
                ended = (info.flags & MediaCodec.BUFFER_FLAG_END_OF_STREAM) != 0;
            }
        }
    }

    private static void fill(Image image, Bitmap frame, int width, int height) throws IOException {
        if (image == null) {
            throw new IOException("the encoder accepts no pictures");
        }
        Bitmap scaled = Bitmap.createScaledBitmap(frame, width, height, true);
        int[] argb = new int[width * height];
        scaled.getPixels(argb, 0, width, 0, 0, width, height);
        Image.Plane[] planes = image.getPlanes();
        Plane[] targets = new Plane[planes.length];
        for (int i = 0; i < planes.length; i++) {
            targets[i] = new Plane(planes[i].getBuffer(), planes[i].getRowStride(), planes[i].getPixelStride());
        }
        toYuv(argb, width, height, targets[0], targets[1], targets[2]);
    }

    /** A plane of a YUV picture. */
    record Plane(ByteBuffer bytes, int rowStride, int pixelStride) {
        void put(int x, int y, double value) {
            bytes.put(y * rowStride + x * pixelStride, (byte) Math.round(value));
        }
    }

    /**
     * Convert to YUV 4:2:0, BT.601, limited range; chroma is the mean of 2 x 2 pixels. Source: ITU-R BT.601-7.
     *
     * @param argb width x height pixels, both even
     */
    static void toYuv(int[] argb, int width, int height, Plane luma, Plane blue, Plane red) {
        for (int y = 0; y < height; y += 2) {
            for (int x = 0; x < width; x += 2) {
                double r = 0;
                double g = 0;
                double b = 0;
                for (int i = 0; i < 4; i++) {
                    int px = x + (i & 1);
                    int py = y + (i >> 1);
                    int pixel = argb[py * width + px];
                    double pr = (pixel >> 16 & 0xFF) / 255.0;
                    double pg = (pixel >> 8 & 0xFF) / 255.0;
                    double pb = (pixel & 0xFF) / 255.0;
                    luma.put(px, py, 16 + 219 * (0.299 * pr + 0.587 * pg + 0.114 * pb));
                    r += pr / 4;
                    g += pg / 4;
                    b += pb / 4;
                }
                double mean = 0.299 * r + 0.587 * g + 0.114 * b;
                blue.put(x / 2, y / 2, 128 + 224 * (b - mean) / 1.772);
                red.put(x / 2, y / 2, 128 + 224 * (r - mean) / 1.402);
            }
        }
    }
}
