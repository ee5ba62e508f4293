package dev.mobilevd.demo;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertThrows;

import dev.mobilevd.core.Cancellation;
import dev.mobilevd.core.MobileVdException;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.util.concurrent.atomic.AtomicLong;
import org.junit.Test;

/** The conversion to YUV. The JVM has no encoder. */
public final class Mp4Test {
    @Test
    public void coloursAreThoseOfBt601() {
        // Colour bars of ITU-R BT.601-7, 8 bits: white, black, red, green, blue.
        check(0xFFFFFFFF, 235, 128, 128);
        check(0xFF000000, 16, 128, 128);
        check(0xFFFF0000, 81, 90, 240);
        check(0xFF00FF00, 145, 54, 34);
        check(0xFF0000FF, 41, 240, 110);
    }

    @Test
    public void anEncoderThatDoesNotRespondIsGivenUp() throws Exception {
        AtomicLong now = new AtomicLong(5);
        Cancellation cancellation = new Cancellation();
        Mp4.Watchdog watchdog = new Mp4.Watchdog(cancellation, now::get);
        for (int i = 0; i < 5; i++) {
            now.addAndGet(Mp4.Watchdog.PATIENCE_MS);
            watchdog.check(true); // slow, but it works
        }
        now.addAndGet(Mp4.Watchdog.PATIENCE_MS);
        watchdog.check(false);
        now.addAndGet(1);
        assertEquals(
                "the encoder does not respond",
                assertThrows(IOException.class, () -> watchdog.check(false)).getMessage());
        cancellation.cancel();
        assertThrows(MobileVdException.class, () -> watchdog.check(true));
    }

    @Test
    public void planesMayBePaddedAndInterleaved() {
        int[] argb = {0xFFFFFFFF, 0xFF000000, 0xFF000000, 0xFFFFFFFF, 0xFFFF0000, 0xFFFF0000, 0xFFFF0000, 0xFFFF0000};
        ByteBuffer luma = ByteBuffer.allocate(2 * 6);
        ByteBuffer both = ByteBuffer.allocate(4);
        // Two chroma pixels, blue and red interleaved as in NV12; each row of luma has two bytes of padding.
        Mp4.toYuv(
                new int[] {argb[0], argb[1], argb[4], argb[5], argb[2], argb[3], argb[6], argb[7]}, 4, 2,
                new Mp4.Plane(luma, 6, 1), new Mp4.Plane(both, 4, 2), new Mp4.Plane(tail(both), 4, 2));
        assertEquals(235, luma.get(0) & 0xFF);
        assertEquals(16, luma.get(1) & 0xFF);
        assertEquals(0, luma.get(4));
        assertEquals(16, luma.get(6) & 0xFF);
        assertEquals("white and black are grey", 128, both.get(0) & 0xFF);
        assertEquals(128, both.get(1) & 0xFF);
        assertEquals(90, both.get(2) & 0xFF);
        assertEquals(240, both.get(3) & 0xFF);
    }

    private static ByteBuffer tail(ByteBuffer buffer) {
        ByteBuffer rest = buffer.duplicate();
        rest.position(1);
        return rest.slice();
    }

    private static void check(int colour, int y, int cb, int cr) {
        ByteBuffer planes = ByteBuffer.allocate(6);
        ByteBuffer blue = ByteBuffer.allocate(1);
        ByteBuffer red = ByteBuffer.allocate(1);
        Mp4.toYuv(
                new int[] {colour, colour, colour, colour}, 2, 2, new Mp4.Plane(planes, 2, 1),
                new Mp4.Plane(blue, 1, 1), new Mp4.Plane(red, 1, 1));
        assertEquals(y, planes.get(3) & 0xFF);
        assertEquals(cb, blue.get(0) & 0xFF);
        assertEquals(cr, red.get(0) & 0xFF);
    }
}
