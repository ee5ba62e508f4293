package dev.mobilevd.core;

import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;

/** Computes a SHA-256. */
final class Sha256 {
    private final MessageDigest digest;

    Sha256() {
        try {
            digest = MessageDigest.getInstance("SHA-256");
        } catch (NoSuchAlgorithmException error) {
            throw new IllegalStateException(error); // every Java implements it
        }
    }

    static String of(byte[] bytes) {
        Sha256 made = new Sha256();
        made.add(bytes, bytes.length);
        return made.hex();
    }

    void add(byte[] bytes, int count) {
        digest.update(bytes, 0, count);
    }

    /** The digest in lower-case hex. Call it once, after the last add. */
    String hex() {
        StringBuilder text = new StringBuilder();
        for (byte value : digest.digest()) {
            text.append(Character.forDigit(value >> 4 & 0xF, 16)).append(Character.forDigit(value & 0xF, 16));
        }
        return text.toString();
    }
}
