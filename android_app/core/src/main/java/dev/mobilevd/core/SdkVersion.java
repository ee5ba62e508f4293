package dev.mobilevd.core;

import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/**
 * A version of QAIRT, Qualcomm's SDK.
 *
 * @param text as in libraries and binaries, such as "v2.51.0.260929181845"; the last number is the build time
 */
public record SdkVersion(String text, int major, int minor, int patch) {
    static final Pattern PATTERN = Pattern.compile("v([0-9]{1,6})\\.([0-9]{1,6})\\.([0-9]{1,6})(\\.[0-9]+)?");
    private static final Pattern IN_LIBRARY = Pattern.compile("v[0-9]{1,3}\\.[0-9]{1,3}\\.[0-9]{1,3}\\.[0-9]{12}");

    // Chunks overlap, so that a version on their border is found.
    private static final int CHUNK = 1 << 20;
    private static final int OVERLAP = 32;

    static SdkVersion parse(String text) {
        Matcher match = PATTERN.matcher(text);
        if (!match.matches()) {
            throw new IllegalArgumentException(text);
        }
        return new SdkVersion(
                text, Integer.parseInt(match.group(1)), Integer.parseInt(match.group(2)),
                Integer.parseInt(match.group(3)));
    }

    /**
     * Find the version in a QNN library. libQnnHtp.so, stubs and skeletons contain it, libQnnSystem.so does not.
     *
     * @return null if the library contains none
     */
    public static SdkVersion ofLibrary(Path library) throws MobileVdException {
        byte[] buffer = new byte[CHUNK];
        int kept = 0;
        try (InputStream input = Files.newInputStream(library)) {
            for (int count; (count = input.read(buffer, kept, CHUNK - kept)) >= 0; ) {
                int filled = kept + count;
                Matcher match = IN_LIBRARY.matcher(new String(buffer, 0, filled, StandardCharsets.ISO_8859_1));
                if (match.find()) {
                    return parse(match.group());
                }
                kept = Math.min(filled, OVERLAP);
                System.arraycopy(buffer, filled - kept, buffer, 0, kept);
            }
            return null;
        } catch (IOException error) {
            throw new MobileVdException(
                    error, Problem.FILE_UNREADABLE, library.getFileName().toString(), error.toString());
        }
    }

    /** Whether a runtime of this version is older than {@code needed}; builds of one release count as equal. */
    public boolean isOlderThan(SdkVersion needed) {
        if (major != needed.major) {
            return major < needed.major;
        }
        return minor != needed.minor ? minor < needed.minor : patch < needed.patch;
    }

    @Override
    public String toString() {
        return text;
    }
}
