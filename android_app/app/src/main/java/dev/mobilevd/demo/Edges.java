package dev.mobilevd.demo;

import android.app.Activity;
import android.graphics.Insets;
import android.os.Build;
import android.view.View;
import android.view.WindowInsets;

/** Draws behind the system's bars and keeps content clear of them, of the cutout and of the keyboard. */
final class Edges {
    private Edges() {}

    /** {@code screen} gets the bars as its padding; it has none of its own. */
    static void fit(Activity activity, View screen) {
        if (Build.VERSION.SDK_INT < 30) {
            return; // there the system itself keeps content between its bars
        }
        activity.getWindow().setDecorFitsSystemWindows(false);
        screen.setOnApplyWindowInsetsListener(
                (view, insets) -> {
                    Insets bars =
                            insets.getInsets(
                                    WindowInsets.Type.systemBars()
                                            | WindowInsets.Type.displayCutout()
                                            | WindowInsets.Type.ime());
                    view.setPadding(bars.left, bars.top, bars.right, bars.bottom);
                    return WindowInsets.CONSUMED;
                });
    }
}
