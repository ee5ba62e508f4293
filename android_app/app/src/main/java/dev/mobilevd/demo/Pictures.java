package dev.mobilevd.demo;

import android.graphics.Bitmap;
import android.graphics.ColorSpace;
import android.graphics.ImageDecoder;
import android.util.Size;
import dev.mobilevd.core.ImagePrep;
import dev.mobilevd.core.Manifest;
import dev.mobilevd.core.MobileVdException;
import java.io.File;
import java.io.IOException;

/** Decodes pictures upright and in sRGB. */
final class Pictures {
    // 48 MB of pixels in the bitmap, and again in the array. Larger photographs are decoded at 1/2, 1/3, ... of their
    // size, which is still far above a pipeline's input.
    private static final int MOST_PIXELS = 12_000_000;
    private static final int PREVIEW_PIXELS = 1_500_000;

    private Pictures() {}

    /** A picture for the screen. */
    static Bitmap preview(File file) throws IOException {
        return decode(file, PREVIEW_PIXELS);
    }

    /** A picture for the pipeline: (1, 3, height, width) in [-1, 1]. */
    static float[] prepare(File file, Manifest.PipelineSpec spec) throws IOException, MobileVdException {
        Bitmap bitmap = decode(file, MOST_PIXELS);
        int width = bitmap.getWidth();
        int height = bitmap.getHeight();
        int[] pixels = new int[width * height];
        bitmap.getPixels(pixels, 0, width, 0, 0, width, height);
        bitmap.recycle();
        return ImagePrep.prepare(pixels, width, height, spec.width(), spec.height());
    }

    private static Bitmap decode(File file, int mostPixels) throws IOException {
        return ImageDecoder.decodeBitmap(
                ImageDecoder.createSource(file),
                (decoder, info, source) -> {
                    Size size = info.getSize();
                    double shrink = Math.sqrt((double) size.getWidth() * size.getHeight() / mostPixels);
                    decoder.setTargetSampleSize((int) Math.max(Math.ceil(shrink), 1));
                    decoder.setAllocator(ImageDecoder.ALLOCATOR_SOFTWARE);
                    decoder.setTargetColorSpace(ColorSpace.get(ColorSpace.Named.SRGB));
                });
    }
}
