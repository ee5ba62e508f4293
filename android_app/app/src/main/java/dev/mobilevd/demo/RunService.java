package dev.mobilevd.demo;

import android.app.Notification;
import android.app.NotificationChannel;
import android.app.NotificationManager;
import android.app.PendingIntent;
import android.app.Service;
import android.content.Context;
import android.content.Intent;
import android.graphics.drawable.Icon;
import android.os.IBinder;

/**
 * Keeps the process running while a clip is generated and the app is in the background: from Android 14 on the system
 * freezes it otherwise. Its notification can cancel the run. A short service may run for about 3 minutes; then the run
 * is stopped, and the screen says so.
 */
public final class RunService extends Service {
    static final String CANCEL = "dev.mobilevd.demo.CANCEL";
    private static final String CHANNEL = "run";
    private static final int NOTIFICATION = 1;

    /** Start it; returns false if the system does not allow it now. */
    static boolean start(Context context) {
        try {
            return context.startForegroundService(new Intent(context, RunService.class)) != null;
        } catch (IllegalStateException | SecurityException error) {
            return false;
        }
    }

    @Override
    public int onStartCommand(Intent intent, int flags, int startId) {
        // The system ends the process unless a started service does this first, even if the run is over already.
        startForeground(NOTIFICATION, notification());
        if (intent != null && CANCEL.equals(intent.getAction())) {
            studio().cancel();
        }
        studio().attach(this);
        return START_NOT_STICKY;
    }

    @Override
    public void onTimeout(int startId) {
        studio().stopInBackground();
        stopSelf();
    }

    @Override
    public void onDestroy() {
        studio().detach(this);
        super.onDestroy();
    }

    @Override
    public IBinder onBind(Intent intent) {
        return null;
    }

    private Studio studio() {
        return ((DemoApp) getApplication()).studio();
    }

    private Notification notification() {
        NotificationChannel channel =
                new NotificationChannel(CHANNEL, getString(R.string.run_channel), NotificationManager.IMPORTANCE_LOW);
        getSystemService(NotificationManager.class).createNotificationChannel(channel);
        Intent open = new Intent(this, MainActivity.class).addFlags(Intent.FLAG_ACTIVITY_NEW_TASK);
        Intent cancel = new Intent(this, RunService.class).setAction(CANCEL);
        Notification.Action action =
                new Notification.Action.Builder(
                                Icon.createWithResource(this, R.drawable.ic_close), getString(R.string.cancel),
                                PendingIntent.getService(this, 0, cancel, PendingIntent.FLAG_IMMUTABLE))
                        .build();
        return new Notification.Builder(this, CHANNEL)
                .setSmallIcon(R.drawable.ic_running)
                .setContentTitle(getString(R.string.run_notification))
                .setContentIntent(PendingIntent.getActivity(this, 0, open, PendingIntent.FLAG_IMMUTABLE))
                .setProgress(0, 0, true)
                .setOngoing(true)
                .addAction(action)
                .build();
    }
}
