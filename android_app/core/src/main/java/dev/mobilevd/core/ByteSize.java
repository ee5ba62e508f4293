package dev.mobilevd.core;

import java.util.Locale;

/** A number of bytes, for messages. */
public record ByteSize(long bytes) {
    /** Formatted with decimal units and three digits: "812 bytes", "4.20 MB", "1.35 GB". */
    @Override
    public String toString() {
        String[] units = {"kB", "MB", "GB", "TB"};
        if (bytes < 1000) {
            return bytes + " bytes";
        }
        double value = bytes / 1000.0;
        int unit = 0;
        while (value >= 999.5 && unit < units.length - 1) {
            value /= 1000.0;
            unit++;
        }
        int decimals = value < 9.995 ? 2 : value < 99.95 ? 1 : 0;
        return String.format(Locale.ROOT, "%." + decimals + "f %s", value, units[unit]);
    }
}
