package dev.mobilevd.demo;

import android.graphics.Bitmap;
import android.graphics.drawable.AnimationDrawable;
import android.graphics.drawable.BitmapDrawable;
import android.content.res.Resources;
import dev.mobilevd.core.Backend;
import dev.mobilevd.core.Clip;
import dev.mobilevd.core.ComponentRun;
import dev.mobilevd.core.ImagePrep;
import dev.mobilevd.core.MobileVdException;
import dev.mobilevd.core.Problem;
import java.io.BufferedInputStream;
import java.io.BufferedOutputStream;
import java.io.DataInputStream;
import java.io.DataOutputStream;
import java.io.File;
import java.io.FileInputStream;
import java.io.FileOutputStream;
import java.io.IOException;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;

/**
 * A clip and how it was generated. A file keeps it across processes.
 *
 * @param frames opaque ARGB pixels, row by row
 * @param wallMs duration from the start of the run to the last frame
 * @param saved address in the gallery; null if it was not saved
 */
record Result(
        int width, int height, int fps, long seed, List<int[]> frames, List<Row> rows, double wallMs, String saved) {
    private static final int FORMAT = 2;

    /**
     * The run of one component.
     *
     * @param loadMs duration of loading
     * @param ms duration of the run
     * @param whyNotNpu why it ran on the CPU; null if it ran on the NPU, or if the CPU was requested
     */
    record Row(String component, Backend backend, double loadMs, double ms, MobileVdException whyNotNpu) {
        static Row of(ComponentRun run) {
            return new Row(run.component(), run.backend(), run.loadMs(), run.ms().get(0), run.whyNotNpu());
        }
    }

    static Result of(Clip clip, long seed, double wallMs) {
        int width = clip.pipeline().width();
        int height = clip.pipeline().height();
        List<int[]> frames = new ArrayList<>();
        for (int i = 0; i < clip.pipeline().frames(); i++) {
            frames.add(ImagePrep.toArgb(clip.frames(), i, width, height));
        }
        List<Row> rows = new ArrayList<>();
        clip.runs().forEach(run -> rows.add(Row.of(run)));
        return new Result(width, height, clip.pipeline().fps(), seed, frames, rows, wallMs, null);
    }

    /** Time outside the rows: loading, checks of the files, the picture. With them it adds up to {@link #wallMs}. */
    double otherMs() {
        return Math.max(wallMs - rows.stream().mapToDouble(Row::ms).sum(), 0);
    }

    /** The time of each component with its loading, in ms. */
    Map<String, Double> times() {
        Map<String, Double> times = new HashMap<>();
        rows.forEach(row -> times.put(row.component(), row.loadMs() + row.ms()));
        return times;
    }

    Result savedAs(String uri) {
        return new Result(width, height, fps, seed, frames, rows, wallMs, uri);
    }

    Bitmap bitmap(int frame) {
        return Bitmap.createBitmap(frames.get(frame), width, height, Bitmap.Config.ARGB_8888);
    }

    /** The clip as a drawable that loops at its frame rate. */
    AnimationDrawable animation(Resources resources) {
        AnimationDrawable animation = new AnimationDrawable();
        for (int i = 0; i < frames.size(); i++) {
            animation.addFrame(new BitmapDrawable(resources, bitmap(i)), Math.round(1000f / fps));
        }
        animation.setOneShot(false);
        return animation;
    }

    void write(File file) throws IOException {
        File partial = new File(file.getPath() + ".partial");
        try (DataOutputStream out =
                new DataOutputStream(new BufferedOutputStream(new FileOutputStream(partial)))) {
            out.writeInt(FORMAT);
            out.writeInt(width);
            out.writeInt(height);
            out.writeInt(fps);
            out.writeLong(seed);
            out.writeDouble(wallMs);
            out.writeUTF(saved == null ? "" : saved);
            out.writeInt(rows.size());
            for (Row row : rows) {
                out.writeUTF(row.component);
                out.writeUTF(row.backend.name());
                out.writeDouble(row.loadMs);
                out.writeDouble(row.ms);
                out.writeUTF(row.whyNotNpu == null ? "" : row.whyNotNpu.problem().name());
                List<Object> arguments = row.whyNotNpu == null ? List.of() : row.whyNotNpu.arguments();
                out.writeInt(arguments.size());
                for (Object argument : arguments) {
                    out.writeUTF(String.valueOf(argument));
                }
            }
            out.writeInt(frames.size());
            for (int[] frame : frames) {
                for (int pixel : frame) {
                    out.writeInt(pixel);
                }
            }
        }
        if (!partial.renameTo(file)) {
            throw new IOException(file + " cannot be replaced");
        }
    }

    /** Read what {@link #write} wrote. */
    static Result read(File file) throws IOException {
        try (DataInputStream in = new DataInputStream(new BufferedInputStream(new FileInputStream(file)))) {
            if (in.readInt() != FORMAT) {
                throw new IOException("another format");
            }
            int width = in.readInt();
            int height = in.readInt();
            int fps = in.readInt();
            long seed = in.readLong();
            double wallMs = in.readDouble();
            String saved = in.readUTF();
            List<Row> rows = new ArrayList<>();
            for (int left = in.readInt(); left > 0; left--) {
                rows.add(readRow(in));
            }
            List<int[]> frames = new ArrayList<>();
            for (int left = in.readInt(); left > 0; left--) {
                int[] frame = new int[width * height];
                for (int i = 0; i < frame.length; i++) {
                    frame[i] = in.readInt();
                }
                frames.add(frame);
            }
            return new Result(width, height, fps, seed, frames, rows, wallMs, saved.isEmpty() ? null : saved);
        } catch (IllegalArgumentException | NegativeArraySizeException error) {
            throw new IOException(error);
        }
    }

    private static Row readRow(DataInputStream in) throws IOException {
        String component = in.readUTF();
        Backend backend = Backend.valueOf(in.readUTF());
        double loadMs = in.readDouble();
        double ms = in.readDouble();
        String problem = in.readUTF();
        Object[] arguments = new Object[in.readInt()];
        for (int i = 0; i < arguments.length; i++) {
            arguments[i] = in.readUTF();
        }
        MobileVdException why =
                problem.isEmpty() ? null : new MobileVdException(Problem.valueOf(problem), arguments);
        return new Row(component, backend, loadMs, ms, why);
    }
}
