package dev.mobilevd.demo;

import android.annotation.SuppressLint;
import android.content.Context;
import android.text.format.Formatter;
import dev.mobilevd.core.ByteSize;
import dev.mobilevd.core.MobileVdException;
import java.text.DecimalFormatSymbols;
import java.util.Locale;

/** A text that is translated when it is shown. */
@FunctionalInterface
interface Words {
    String in(Context context);

    /** A string resource. Arguments of the type Words are translated too. */
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

    /** The sentence of a problem: the resource with its name. */
    @SuppressLint("DiscouragedApi") // a test checks that each constant has its resource
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

    /** The message of an error; its class if it has none. */
    static String reason(Throwable error) {
        return error.getMessage() == null ? error.toString() : error.getMessage();
    }

    /** A number of bytes. */
    static Words size(long bytes) {
        return context -> Formatter.formatShortFileSize(context, bytes);
    }

    /** A duration: in milliseconds below one second, else in seconds. */
    static Words time(double ms) {
        return ms < 999.5 ? milliseconds(ms) : seconds(ms);
    }

    /** A duration in a table, where all have the same unit. */
    static Words milliseconds(double ms) {
        return context -> {
            Locale locale = locale(context);
            String number = String.format(locale, ms < 9.95 ? "%.1f" : "%,.0f", ms);
            // Below 9.2, a thousands separator could be read as a decimal separator.
            char separator = DecimalFormatSymbols.getInstance(locale).getGroupingSeparator();
            return context.getString(R.string.milliseconds, ms < 9.95 ? number : number.replace(separator, '\u00a0'));
        };
    }

    /** A duration in seconds. */
    static Words seconds(double ms) {
        return context ->
                context.getString(R.string.seconds, String.format(locale(context), "%.1f", ms / 1000));
    }

    private static Locale locale(Context context) {
        return context.getResources().getConfiguration().getLocales().get(0);
    }

    /** A stage of a {@link dev.mobilevd.core.RunTrace}. */
    static Words stage(String id) {
        return switch (id) {
            case "load" -> of(R.string.stage_load);
            case "warmup", "run" -> of(R.string.stage_run);
            case "close" -> of(R.string.stage_close);
            default -> context -> id; // of another version
        };
    }

    /** The readable name of a component, or of {@link State.Row#OTHER}. */
    static Words component(String name) {
        return switch (name) {
            case "image_encoder" -> of(R.string.component_image_encoder);
            case "vae_encoder" -> of(R.string.component_vae_encoder);
            case "unet" -> of(R.string.component_unet);
            case "decoder" -> of(R.string.component_decoder);
            case State.Row.OTHER -> of(R.string.component_other);
            default -> context -> name.replace('_', ' '); // of a newer exporter
        };
    }
}
