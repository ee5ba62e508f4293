package dev.mobilevd.core;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertFalse;
import static org.junit.Assert.assertTrue;

import java.util.Collections;
import java.util.HashSet;
import java.util.List;
import java.util.Locale;
import java.util.Set;
import org.junit.Test;

public class ProblemTest {
    @Test
    public void everyProblemIsASentenceOfItsOwn() {
        Set<String> sentences = new HashSet<>();
        for (Problem problem : Problem.values()) {
            String sentence =
                    String.format(Locale.ROOT, problem.pattern(), Collections.nCopies(3, "THAT").toArray());
            assertTrue(sentence, sentences.add(sentence));
            assertFalse(sentence, sentence.contains("%"));
        }
        assertTrue(Problem.NPU_PLACEMENT.isNpu());
        assertFalse(Problem.RUN_FAILED.isNpu());
    }

    @Test
    public void anExceptionSpeaksAndKeepsItsParts() {
        MobileVdException error = new MobileVdException(Problem.NO_SPACE, new ByteSize(4_200_000), new ByteSize(7));
        assertEquals("Not enough storage: 4.20 MB are needed, 7 bytes are free.", error.getMessage());
        assertEquals(List.of(new ByteSize(4_200_000), new ByteSize(7)), error.arguments());
    }

    @Test
    public void sizesAreShortAndNeverMisleading() {
        assertEquals("999 bytes", new ByteSize(999).toString());
        assertEquals("1.00 kB", new ByteSize(1000).toString());
        assertEquals("12.3 MB", new ByteSize(12_345_678).toString());
        assertEquals("1.00 MB", new ByteSize(999_950).toString());
        assertEquals("999 MB", new ByteSize(999_400_000).toString());
        assertEquals("1.35 GB", new ByteSize(1_350_000_000).toString());
        assertEquals("5000 TB", new ByteSize(5_000_000_000_000_000L).toString());
    }
}
