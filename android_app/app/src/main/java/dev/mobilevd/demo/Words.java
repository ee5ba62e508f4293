package dev.mobilevd.demo;

import android.annotation.SuppressLint;
import android.content.Context;
import android.text.format.Formatter;
import dev.mobilevd.core.ByteSize;
import dev.mobilevd.core.MobileVdException;
import java.text.DecimalFormatSymbols;
import java.util.Locale;

/** Something to be said to the reader, in the language that the screen has when it is shown. */
@FunctionalInterface
interface Words {
    String in(Context context);

    /** A string resource; arguments that are Words are said in the same language. */
    static Words of(int resource, Object... arguments) {
        return context -> {
            Object[] said = arguments.clone();
            for (int i = 0; i < said.length; i++) {
                if (said[i] instanceof Words) {
                    said[i] = ((Words) said[i]).in(context);
                }
            }
            return context.getString(resource, said);
        };
    }

    /** A problem of the core: its sentence is the resource that is called after it. */
    @SuppressLint("DiscouragedApi") // one resource per constant, which a test checks
    static Words of(MobileVdException error) {
        return context -> {
            String name = "problem_" + error.problem().name().toLowerCase(Locale.ROOT);
            int resource = context.getResources().getIdentifier(name, "string", context.getPackageName());
            Object[] arguments = error.arguments().toArray();
            for (int i = 0; i < arguments.length; i++) {
                arguments[i] = arguments[i] instanceof ByteSize size ? size(size.bytes()).in(context) : arguments[i];
            }
            return context.getString(resource, arguments);
        };
    }

    /** A number of bytes. */
    static Words size(long bytes) {
        return context -> Formatter.formatShortFileSize(context, bytes);
    }

    /** A time: milliseconds below a second, else seconds. */
    static Words time(double ms) {
        return ms < 999.5 ? milliseconds(ms) : seconds(ms);
    }

    /** A time that stands among others, which one unit makes easy to compare. */
    static Words milliseconds(double ms) {
        return context -> {
            Locale locale = locale(context);
            String number = String.format(locale, ms < 9.95 ? "%.1f" : "%,.0f", ms);
            // Beside 9.2, a comma or point between thousands would read as the decimal one.
            char separator = DecimalFormatSymbols.getInstance(locale).getGroupingSeparator();
            return context.getString(R.string.milliseconds, ms < 9.95 ? number : number.replace(separator, '\u00a0'));
        };
    }

    /** A time that runs, or is long. */
    static Words seconds(double ms) {
        return context ->
                context.getString(R.string.seconds, String.format(locale(context), "%.1f", ms / 1000));
    }

    private static Locale locale(Context context) {
        return context.getResources().getConfiguration().getLocales().get(0);
    }

    /** A step that {@link dev.mobilevd.core.RunTrace} names. */
    static Words stage(String id) {
        return switch (id) {
            case "load" -> of(R.string.stage_load);
            case "warmup", "run" -> of(R.string.stage_run);
            case "close" -> of(R.string.stage_close);
            default -> context -> id; // of another version
        };
    }

    /** A component of a manifest, as a reader would write it. */
    static String component(String name) {
        return name.replace('_', ' ');
    }
}
