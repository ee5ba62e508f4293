package dev.mobilevd.core;

import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.Paths;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/**
 * Samples the resident memory of this process until it is closed. It does not include memory that a driver allocates
 * outside the process.
 */
final class PeakMemory implements AutoCloseable {
    private static final Path STATUS = Paths.get("/proc/self/status");
    private static final Pattern RESIDENT = Pattern.compile("VmRSS:\\s+([0-9]+) kB");
    private static final long EVERY_MS = 20;

    private final Thread thread = new Thread(this::watch, "peak memory");
    private volatile long peak;
    private volatile boolean closed;

    PeakMemory() {
        look();
        thread.setDaemon(true);
        thread.start();
    }

    /** The peak in bytes so far; null if the system does not report it. */
    Long bytes() {
        look();
        return peak > 0 ? peak : null;
    }

    @Override
    public void close() {
        closed = true;
        thread.interrupt();
    }

    private void watch() {
        while (!closed) {
            look();
            try {
                Thread.sleep(EVERY_MS);
            } catch (InterruptedException error) {
                return; // by close()
            }
        }
    }

    private synchronized void look() {
        try {
            String text = new String(Files.readAllBytes(STATUS), StandardCharsets.US_ASCII);
            Matcher match = RESIDENT.matcher(text);
            if (match.find()) {
                peak = Math.max(peak, Long.parseLong(match.group(1)) * 1024);
            }
        } catch (IOException error) {
            closed = true; // no such file on this system
        }
    }
}
