package dev.mobilevd.core;

/**
 * All problems, one constant per sentence.
 *
 * <p>The English sentence is a {@link java.util.Formatter} pattern for {@link MobileVdException#arguments}. An app
 * finds the translation by the constant's name, and may format arguments of the type {@link ByteSize} itself.
 */
public enum Problem {
    // The manifest.
    MANIFEST_UNREADABLE("manifest.json is not readable: %1$s"),
    MANIFEST_VERSION("The artifact has manifest version %1$s; this app reads version %2$s. Get a newer app."),
    MANIFEST_INVALID("manifest.json is not valid: %1$s"),
    MANIFEST_CHANGED("manifest.json does not match manifest.sha256: one of them was changed. Copy the artifact again."),

    // The artifact's folder.
    FILE_MISSING("%1$s is missing. Copy the artifact again."),
    FILE_SIZE("%1$s has the wrong size: %2$s instead of %3$s. Copy the artifact again."),
    FILE_DAMAGED("%1$s is damaged: its SHA-256 differs from the manifest. Copy the artifact again."),
    FILE_EXTRA("%1$s is not in the manifest. Remove it, or copy the artifact again."),
    FILE_NOT_PLAIN("%1$s is not a regular file. Copy the artifact again."),
    FILE_UNREADABLE("%1$s cannot be read: %2$s"),

    // Installation.
    ARCHIVE_UNREADABLE("This is not a readable .mvd file: %1$s"),
    ARCHIVE_ORDER("This is not an .mvd file of an artifact: it begins with %1$s instead of manifest.json."),
    ARCHIVE_FOREIGN("The .mvd file contains %1$s, which its manifest does not list. Nothing was installed."),
    ARCHIVE_TWICE("The .mvd file contains %1$s twice. Nothing was installed."),
    ARCHIVE_SHORT("The .mvd file ends before %1$s. Copy it again."),
    ARCHIVE_BOMB("%1$s is too large after unpacking. Nothing was installed."),
    NAME_INVALID("\"%1$s\" is not a valid artifact name: use letters, digits, dot, dash and underscore."),
    NOT_INSTALLED("No artifact \"%1$s\" is installed."),
    NO_SPACE("Not enough storage: %1$s are needed, %2$s are free."),
    NOT_WRITTEN("%1$s cannot be written: %2$s"),

    // Running.
    NO_MEMORY("%1$s needs about %2$s of memory, %3$s are available. Close other apps."),
    MEMORY_RAN_OUT("%1$s ran out of memory. Close other apps."),
    IMAGE_INVALID("The picture cannot be used: %1$s"),
    IMAGE_TOO_LARGE("The picture has more than %1$s."),
    SEED_INVALID("\"%1$s\" is not a seed: use an integer from 0 to 18446744073709551615."),
    MODEL_REFUSED("%1$s cannot be loaded: %2$s"),
    RUN_FAILED("%1$s failed: %2$s"),
    OUTPUT_UNEXPECTED("%1$s returned %2$s; the manifest says %3$s."),
    OUTPUT_NOT_FINITE("%1$s returned NaN or infinite values. Try another seed or picture."),
    CANCELLED("Cancelled."),

    // The NPU.
    NPU_NOT_IN_APP("This version of the app has no libraries for the NPU."),
    NPU_LIBRARY_FAILS("The NPU's libraries do not start: %1$s"),
    NPU_NOT_FOUND("The runtime finds no NPU in this device."),
    NPU_NO_BINARY("%1$s has no binary for any NPU."),
    NPU_OTHER_CHIP("%1$s was compiled for %2$s; this device has %3$s."),
    NPU_RUNTIME_OLD("%1$s was compiled by QNN %2$s; this app's QNN is %3$s, which is older."),
    NPU_REFUSED("The NPU cannot load %1$s: %2$s"),
    NPU_PLACEMENT("%1$s ran only partly on the NPU: %2$s nodes on the NPU, %3$s nodes elsewhere."),
    NPU_RUN_FAILED("%1$s failed twice on the NPU: %2$s"),
    NPU_NOT_FINITE("%1$s returned NaN or infinite values on the NPU, twice."),

    // Benchmarks.
    BENCHMARK_INVALID("Invalid benchmark request: %1$s");

    private final String pattern;

    Problem(String pattern) {
        this.pattern = pattern;
    }

    /** The English sentence, with %1$s, %2$s, ... for the arguments. */
    public String pattern() {
        return pattern;
    }

    /** Whether it prevents only the use of the NPU, so that the CPU can be used instead. */
    public boolean isNpu() {
        return name().startsWith("NPU_");
    }
}
