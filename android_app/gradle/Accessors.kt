// What Gradle generates for its scripts, so that `build.py check-gradle` can type-check them without Gradle.
// build.py adds the object `libs`, from the version catalogue.
import com.android.build.api.dsl.ApplicationExtension
import com.android.build.api.variant.ApplicationAndroidComponentsExtension
import org.gradle.api.Project
import org.gradle.api.artifacts.dsl.DependencyHandler
import org.gradle.api.plugins.JavaPluginExtension

interface Library

interface Version {
    fun get(): String
}

fun Project.android(configure: ApplicationExtension.() -> Unit): Unit = TODO()

fun Project.androidComponents(configure: ApplicationAndroidComponentsExtension.() -> Unit): Unit = TODO()

fun Project.java(configure: JavaPluginExtension.() -> Unit): Unit = TODO()

fun Project.dependencies(configure: DependencyHandler.() -> Unit): Unit = TODO()

fun DependencyHandler.project(path: String): Library = TODO()

fun DependencyHandler.implementation(library: Library): Unit = TODO()

fun DependencyHandler.compileOnly(library: Library): Unit = TODO()

fun DependencyHandler.testImplementation(library: Library): Unit = TODO()

operator fun String.invoke(library: Library): Unit = TODO()
