package dev.mobilevd.demo;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertNotEquals;
import static org.junit.Assert.assertTrue;

import android.content.Context;
import android.content.res.Configuration;
import dev.mobilevd.core.ByteSize;
import dev.mobilevd.core.MobileVdException;
import dev.mobilevd.core.Problem;
import java.lang.reflect.Field;
import java.util.Locale;
import java.util.TreeSet;
import java.util.regex.MatchResult;
import java.util.regex.Pattern;
import java.util.stream.Collectors;
import org.junit.Test;
import org.junit.runner.RunWith;
import org.robolectric.RobolectricTestRunner;
import org.robolectric.RuntimeEnvironment;
import org.robolectric.annotation.Config;

/** The texts of the app in both languages. */
@RunWith(RobolectricTestRunner.class)
@Config(sdk = 34)
public final class WordsTest {
    private static final Pattern ARGUMENT = Pattern.compile("%\\d\\$s");

    @Test
    public void everyProblemHasItsSentence() {
        for (Problem problem : Problem.values()) {
            MobileVdException error = new MobileVdException(problem, "first", "second", "third");
            assertEquals(error.getMessage(), Words.of(error).in(in(Locale.ENGLISH)));
            assertNotEquals(problem.name(), error.getMessage(), Words.of(error).in(in(Locale.GERMAN)));
        }
    }

    @Test
    public void everyStringIsTranslatedWithTheSameArguments() throws Exception {
        int checked = 0;
        for (Field field : R.string.class.getFields()) {
            int id = field.getInt(null);
            String english = in(Locale.ENGLISH).getString(id);
            String german = in(Locale.GERMAN).getString(id);
            assertEquals(field.getName(), arguments(english), arguments(german));
            checked++;
        }
        assertTrue(checked > 50);
    }

    @Test
    public void sizesAreInTheReadersUnits() {
        MobileVdException error =
                new MobileVdException(Problem.NO_MEMORY, "unet", new ByteSize(1_500_000_000), new ByteSize(312_000_000));
        assertEquals(
                "unet needs about 1.5 GB of memory, 312 MB are available. Close other apps.",
                Words.of(error).in(in(Locale.ENGLISH)));
        assertEquals(
                "unet braucht etwa 1,5 GB Arbeitsspeicher, 312 MB sind verfügbar. Schließe andere Apps.",
                // The system uses a no-break space.
                Words.of(error).in(in(Locale.GERMAN)).replace('\u00a0', ' '));
    }

    @Test
    public void timesHaveNoMoreDigitsThanTheyNeed() {
        Context context = in(Locale.ENGLISH);
        assertEquals("7.3 ms", Words.time(7.25).in(context));
        assertEquals("412 ms", Words.time(411.7).in(context));
        assertEquals("1.0 s", Words.time(999.7).in(context));
        assertEquals("12,3 s", Words.time(12_340).in(in(Locale.GERMAN)));
        assertEquals("1\u00a0240 ms", Words.milliseconds(1239.6).in(context));
        assertEquals("12\u00a0345 ms", Words.milliseconds(12_345).in(in(Locale.GERMAN)));
        assertEquals("9,2 ms", Words.milliseconds(9.2).in(in(Locale.GERMAN)));
    }

    private static Context in(Locale locale) {
        Configuration configuration = new Configuration();
        configuration.setLocale(locale);
        return RuntimeEnvironment.getApplication().createConfigurationContext(configuration);
    }

    private static TreeSet<String> arguments(String text) {
        return ARGUMENT.matcher(text).results().map(MatchResult::group).collect(Collectors.toCollection(TreeSet::new));
    }
}
