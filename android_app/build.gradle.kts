// Gradle files for Android Studio. CI and `make apk` use build.py, which reads the same gradle/libs.versions.toml.
// First use: run `gradle wrapper` here once. Each module has the standard source sets.
plugins {
    alias(libs.plugins.android.application) apply false
}

// The tests read files of the repository. build.py passes the same properties.
subprojects {
    tasks.withType(Test::class.java).configureEach {
        val repository = rootDir.parentFile
        systemProperty("mobilevd.root", repository)
        systemProperty("mobilevd.artifact", repository.resolve("build/demo/artifact"))
        systemProperty("mobilevd.npu", repository.resolve("build/demo/npu"))
        for (name in listOf("qnn", "reference", "npuReference", "results")) {
            systemProperty("mobilevd.$name", "")
        }
    }
}
