package dev.mobilevd.core;

import static org.junit.Assert.assertArrayEquals;
import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertThrows;

import java.util.Collections;
import java.util.List;
import java.util.Map;
import org.junit.Test;

public class NoiseTest {
    @Test
    public void isPythonsNoiseToTheLastBit() throws Exception {
        Map<String, Object> vectors = Golden.json("noise.json");
        assertEquals(Noise.GENERATOR, vectors.get("generator"));
        for (Map<String, Object> vector : Golden.objects(vectors.get("vectors"))) {
            List<Long> indices = Golden.list(vector.get("indices"));
            List<String> bits = Golden.list(vector.get("float32_bits"));
            long seed = Noise.parseSeed((String) vector.get("seed"));
            long stream = (Long) vector.get("stream");
            float[] noise = Noise.unit(seed, stream, Collections.max(indices).intValue() + 1);
            for (int i = 0; i < bits.size(); i++) {
                int found = Float.floatToRawIntBits(noise[indices.get(i).intValue()]);
                assertEquals(vector.toString(), bits.get(i), String.format("%08x", found));
            }
        }
    }

    @Test
    public void isTheSameInverseFarOut() throws Exception {
        for (Object pair : Golden.list(Golden.json("noise.json").get("inverse"))) {
            List<String> words = Golden.list(pair);
            double u = Double.longBitsToDouble(Long.parseUnsignedLong(words.get(0), 16));
            double x = Noise.inverseNormal(u);
            assertEquals(words.get(1), String.format("%016x", Double.doubleToRawLongBits(x)));
        }
    }

    @Test
    public void aValueDependsOnItsIndexAlone() {
        float[] some = Noise.unit(5, 0, 24);
        float[] more = Noise.unit(5, 0, 100);
        assertArrayEquals(some, java.util.Arrays.copyOf(more, 24), 0);
    }

    @Test
    public void readsSeedsOfSixtyFourBits() throws Exception {
        assertEquals(0, Noise.parseSeed("0"));
        assertEquals(7, Noise.parseSeed(" 007 "));
        assertEquals(-1, Noise.parseSeed("18446744073709551615"));
        for (String text : List.of("", "-1", "1.5", "18446744073709551616", "seven", "0x7", "٣")) {
            Golden.assertFails(Problem.SEED_INVALID, () -> Noise.parseSeed(text));
        }
    }

    @Test
    public void refusesStreamsThatDoNotExist() {
        assertThrows(IllegalArgumentException.class, () -> Noise.unit(0, -1, 1));
        assertThrows(IllegalArgumentException.class, () -> Noise.unit(0, 1L << 32, 1));
    }
}
