package dev.mobilevd.core;

import static org.junit.Assert.assertArrayEquals;
import static org.junit.Assert.assertEquals;

import java.util.List;
import java.util.Map;
import org.junit.Test;

public class ImagePrepTest {
    @Test
    public void fitsPicturesAsPillowDoesToTheBit() throws Exception {
        List<Map<String, Object>> pictures = Golden.objects(Golden.json("pictures.json").get("pictures"));
        assertEquals(8, pictures.size());
        for (Map<String, Object> picture : pictures) {
            int[] size = Golden.ints(picture.get("size"));
            int[] to = Golden.ints(picture.get("to_size"));
            float[] values =
                    ImagePrep.prepare(
                            Golden.argb(picture.get("argb")), size[0], size[1], to[0], to[1]);
            byte[] expected = Golden.hex(picture.get("rgb"));
            int plane = to[0] * to[1];
            byte[] found = new byte[3 * plane];
            for (int i = 0; i < values.length; i++) {
                found[i % plane * 3 + i / plane] = (byte) ImagePrep.toByte(values[i]);
            }
            assertArrayEquals(size[0] + "x" + size[1], expected, found);
        }
    }

    @Test
    public void givesPythonsFloats() throws Exception {
        // 0 and 255 are the ends of the range; 100 / 127.5 - 1 in double, then rounded.
        float[] values = ImagePrep.prepare(new int[] {0xFF0064FF}, 1, 1, 1, 1);
        assertArrayEquals(new float[] {-1f, (float) (100 / 127.5 - 1), 1f}, values, 0);
    }

    @Test
    public void everyByteComesBack() throws Exception {
        for (int value = 0; value < 256; value++) {
            int pixel = 0xFF000000 | value << 16 | value << 8 | value;
            float[] values = ImagePrep.prepare(new int[] {pixel}, 1, 1, 1, 1);
            assertArrayEquals(new int[] {pixel}, ImagePrep.toArgb(values, 0, 1, 1));
        }
    }

    @Test
    public void clampsFramesAndRoundsHalvesToEven() {
        assertEquals(0, ImagePrep.toByte(-7));
        assertEquals(255, ImagePrep.toByte(1.5f));
        assertEquals(128, ImagePrep.toByte(0)); // 127.5
        assertEquals(0, ImagePrep.toByte((float) (0.5 / 127.5 - 1) - 1e-7f));
        float[] frames = {-1, 0, 1, 1, 0, -1, -1, -1, -1, 1, 1, 1}; // two frames of 2 x 1
        assertArrayEquals(new int[] {0xFF00FF80, 0xFF80FF00}, ImagePrep.toArgb(frames, 0, 2, 1));
        assertArrayEquals(new int[] {0xFF0000FF, 0xFF00FFFF}, ImagePrep.toArgb(frames, 1, 2, 1));
    }

    @Test
    public void refusesPixelsThatAreNotThere() {
        Golden.assertFails(Problem.IMAGE_INVALID, () -> ImagePrep.prepare(new int[5], 2, 3, 1, 1));
        Golden.assertFails(Problem.IMAGE_INVALID, () -> ImagePrep.prepare(new int[0], 0, 3, 1, 1));
        Golden.assertFails(Problem.IMAGE_INVALID, () -> ImagePrep.prepare(new int[0], 65536, 65536, 1, 1));
    }
}
