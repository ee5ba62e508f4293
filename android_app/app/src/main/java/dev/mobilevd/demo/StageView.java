package dev.mobilevd.demo;

import android.content.Context;
import android.graphics.Canvas;
import android.graphics.Path;
import android.util.AttributeSet;
import android.widget.FrameLayout;

/** Shows picture and clip with the clip's aspect ratio, as large as possible, with round corners. */
public final class StageView extends FrameLayout {
    private final Path outline = new Path();
    private final float radius = getResources().getDimension(R.dimen.stage_radius);
    private double aspect = 2;

    /** Called by the layout. */
    public StageView(Context context, AttributeSet attributes) {
        super(context, attributes);
    }

    /** Set the aspect ratio, width / height. */
    void setAspect(double aspect) {
        if (this.aspect != aspect) {
            this.aspect = aspect;
            requestLayout();
        }
    }

    @Override
    protected void onMeasure(int widthSpec, int heightSpec) {
        int width = MeasureSpec.getSize(widthSpec);
        int room =
                MeasureSpec.getMode(heightSpec) == MeasureSpec.UNSPECIFIED
                        ? getResources().getDisplayMetrics().heightPixels * 3 / 5
                        : MeasureSpec.getSize(heightSpec);
        int height = Math.min((int) Math.round(width / aspect), room);
        super.onMeasure(
                MeasureSpec.makeMeasureSpec(Math.min(width, (int) Math.round(height * aspect)), MeasureSpec.EXACTLY),
                MeasureSpec.makeMeasureSpec(height, MeasureSpec.EXACTLY));
    }

    @Override
    protected void onSizeChanged(int width, int height, int oldWidth, int oldHeight) {
        super.onSizeChanged(width, height, oldWidth, oldHeight);
        outline.reset();
        outline.addRoundRect(0, 0, width, height, radius, radius, Path.Direction.CW);
    }

    @Override
    protected void dispatchDraw(Canvas canvas) {
        canvas.save();
        canvas.clipPath(outline);
        super.dispatchDraw(canvas);
        canvas.restore();
    }
}
