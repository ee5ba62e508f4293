package dev.mobilevd.demo;

import android.app.Activity;
import android.graphics.Insets;
import android.os.Build;
import android.view.View;
import android.view.WindowInsets;

/** Draws behind the system bars; pads the content by the bars, the cutout and the keyboard. */
final class Edges {
    private Edges() {}

    /** Replace the padding of {@code screen} by the insets. */
    static void fit(Activity activity, View screen) {
        if (Build.VERSION.SDK_INT < 30) {
            return; // these versions place the content between the bars
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
