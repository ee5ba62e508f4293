package dev.mobilevd.core;

/**
 * Everything that can go wrong, one constant per sentence.
 *
 * <p>The English sentence is a {@link java.util.Formatter} pattern over {@link MobileVdException#arguments}. An app
 * translates by the constant's name. Arguments that are {@link ByteSize} may be shown in the reader's own units.
 */
public enum Problem {
    // The manifest.
    MANIFEST_UNREADABLE("manifest.json is not readable: %1$s"),
    MANIFEST_VERSION("The artifact has manifest version %1$s; this app reads version %2$s. Get a newer app."),
    MANIFEST_INVALID("manifest.json is not valid: %1$s"),
    MANIFEST_CHANGED("manifest.json does not match manifest.sha256: one of them was changed. Copy the artifact again."),

    // The artifact's folder.
    FILE_MISSING("%1$s is missing. Copy the artifact again."),
    FILE_SIZE("%1$s has %2$s bytes, the manifest says %3$s. Copy the artifact again."),
    FILE_DAMAGED("%1$s is damaged: its SHA-256 is not the manifest's. Copy the artifact again."),
    FILE_EXTRA("%1$s is not in the manifest. Remove it, or copy the artifact again."),
    FILE_NOT_PLAIN("%1$s is not a plain file. Copy the artifact again."),
    FILE_UNREADABLE("%1$s cannot be read: %2$s"),

    // Getting artifacts in.
    ARCHIVE_UNREADABLE("This is not a readable .mvd file: %1$s"),
    ARCHIVE_ORDER("This is not an .mvd file of an artifact: it begins with %1$s instead of manifest.json."),
    ARCHIVE_FOREIGN("The .mvd file holds %1$s, which its manifest does not list. Nothing was installed."),
    ARCHIVE_TWICE("The .mvd file holds %1$s twice. Nothing was installed."),
    ARCHIVE_SHORT("The .mvd file ends before %1$s. Copy it again."),
    ARCHIVE_BOMB("%1$s unpacks to far more than it can hold. Nothing was installed."),
    NAME_INVALID("An artifact cannot be called \"%1$s\": use letters, digits, dot, dash and underscore."),
    NOT_INSTALLED("No artifact \"%1$s\" is installed."),
    NO_SPACE("There is too little storage: %1$s are needed, %2$s are free."),
    NOT_WRITTEN("%1$s cannot be written: %2$s"),

    // Running.
    NO_MEMORY("%1$s needs about %2$s of memory, %3$s are available. Close other apps."),
    MEMORY_RAN_OUT("Memory ran out in %1$s. Close other apps."),
    IMAGE_INVALID("The picture cannot be used: %1$s"),
    SEED_INVALID("\"%1$s\" is not a seed: use a whole number from 0 to 18446744073709551615."),
    MODEL_REFUSED("%1$s cannot be loaded: %2$s"),
    RUN_FAILED("%1$s failed: %2$s"),
    OUTPUT_UNEXPECTED("%1$s gave %2$s, the manifest says %3$s."),
    OUTPUT_NOT_FINITE("%1$s gave values that are not numbers. Try another seed or picture."),
    CANCELLED("Cancelled."),

    // The NPU.
    NPU_NOT_IN_APP("This version of the app has no libraries for the NPU (%1$s)."),
    NPU_LIBRARY_FAILS("The NPU's libraries do not start: %1$s"),
    NPU_NOT_FOUND("The runtime finds no NPU in this device."),
    NPU_NO_BINARY("%1$s has no binary for any NPU."),
    NPU_OTHER_CHIP("%1$s has binaries for %2$s, this device is %3$s."),
    NPU_RUNTIME_OLD("%1$s was compiled by QNN %2$s; this app's QNN is %3$s, which is older."),
    NPU_REFUSED("The NPU refuses %1$s: %2$s"),
    NPU_PLACEMENT("%1$s did not run on the NPU alone: %2$s nodes there, %3$s elsewhere."),

    // Benchmarks.
    BENCHMARK_INVALID("The benchmark was not asked for properly: %1$s");

    private final String pattern;

    Problem(String pattern) {
        this.pattern = pattern;
    }

    /** The English sentence, with %1$s, %2$s, ... for the arguments. */
    public String pattern() {
        return pattern;
    }

    /** Whether it only says why the NPU cannot be used, so that the CPU may take over. */
    public boolean isNpu() {
        return name().startsWith("NPU_");
    }
}
