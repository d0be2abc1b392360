// SPDX-License-Identifier: GPL-2.0

//! The program itself: exit statuses, errors of one line, and files that it writes.

use crate::{tree::Tree, DEBUGFS};
use std::{
    fs,
    io::Read as _,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{symlink, PermissionsExt as _},
            net::UnixStream,
        },
    },
    process::{Command, Output, Stdio},
};

fn program(tree: &Tree, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtio-swiotlb"));
    command.arg("--root").arg(tree.path("")).args(words);
    command
}

fn run(tree: &Tree, words: &[&str]) -> Output {
    program(tree, words).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// The one line of an error, which has status 2 and no output.
fn error(tree: &Tree, words: &[&str]) -> String {
    let output = run(tree, words);
    assert_eq!(
        (output.status.code(), text(&output.stdout)),
        (Some(2), ""),
        "{words:?}"
    );
    let message = text(&output.stderr);
    assert_eq!(message.lines().count(), 1, "{message}");
    message
        .strip_prefix("error: ")
        .unwrap()
        .trim_end()
        .to_owned()
}

#[test]
fn check_has_three_statuses() {
    let tree = Tree::new("disks");
    let status = |words: &[&str]| run(&tree, words).status.code();
    assert_eq!(status(&["check"]), Some(1));
    assert_eq!(
        status(&["check", "--except", "9p,console,virtio11"]),
        Some(0)
    );
    tree.remove(DEBUGFS);
    tree.replace("proc/iomem", "virtio8 swiotlb", "virtio-pci-modern");
    tree.write(
        "sys/bus/virtio/devices/virtio8/features",
        &("0".repeat(32) + "11\n"),
    );
    assert_eq!(
        status(&["check", "--except", "9p,console,virtio11"]),
        Some(2)
    );
    let quiet = run(&tree, &["check", "--quiet"]);
    assert_eq!(
        (quiet.status.code(), quiet.stdout, quiet.stderr),
        (Some(1), vec![], vec![])
    );
}

#[test]
fn errors_are_one_line_that_says_what_to_do() {
    let tree = Tree::new("disks");
    tree.write("bad", "{}\n");
    let bad = tree.path("bad");
    let bad = bad.to_str().unwrap();
    for (words, remedy) in [
        (
            &["check", "--except", "consol"][..],
            "write for example --except console",
        ),
        (
            &["plot", "/nonexistent/file"],
            "check the path and its permissions",
        ),
        (&["plot", bad], "record the file anew"),
        (&["plot", "/dev/null"], "a picture needs two samples"),
        (
            &["metrics", "--output", "/nonexistent/file"],
            "in a directory that you may write to",
        ),
    ] {
        let message = error(&tree, words);
        assert!(message.contains(remedy), "{words:?}: {message}");
    }
    tree.remove(DEBUGFS);
    for command in ["advise", "plot"] {
        let message = error(&tree, &[command]);
        assert!(
            message.contains("mount -t debugfs debugfs /sys/kernel/debug"),
            "{message}"
        );
    }
    tree.remove("sys/bus");
    for command in ["status", "check", "metrics", "report"] {
        let message = error(&tree, &[command]);
        assert!(
            message.contains("mount -t sysfs sysfs /sys"),
            "{command}: {message}"
        );
    }
}

#[test]
fn status_goes_on_without_the_modules_files() {
    let tree = Tree::new("disks");
    tree.remove(DEBUGFS);
    let output = run(&tree, &["status", "--every", "0.001", "--count", "3"]);
    assert!(output.status.success());
    assert_eq!(text(&output.stdout).matches("virtio8 ").count(), 3);
    // Once, and not with each sample.
    assert_eq!(text(&output.stderr).lines().count(), 1);
}

#[test]
fn a_file_is_replaced_and_other_users_may_read_it() {
    let tree = Tree::new("disks");
    let path = tree.path("metrics.prom");
    tree.write("metrics.prom", "before\n");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let output = run(&tree, &["metrics", "--output", path.to_str().unwrap()]);
    assert!(output.status.success() && output.stdout.is_empty());
    assert!(fs::read_to_string(&path)
        .unwrap()
        .contains("virtio_swiotlb_module_loaded 1\n"));
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o644
    );
}

#[test]
fn a_report_is_for_its_owner() {
    let tree = Tree::new("disks");
    let path = tree.path("report.txt");
    let output = run(&tree, &["report", "--output", path.to_str().unwrap()]);
    assert!(output.status.success() && output.stdout.is_empty());
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn what_is_no_regular_file_is_not_replaced() {
    let tree = Tree::new("disks");
    tree.write("target", "before\n");
    symlink("target", tree.path("link")).unwrap();
    fs::create_dir(tree.path("directory")).unwrap();
    for name in ["link", "directory"] {
        let path = tree.path(name);
        let before = fs::symlink_metadata(&path).unwrap().file_type();
        for command in ["report", "metrics"] {
            let message = error(&tree, &[command, "--output", path.to_str().unwrap()]);
            assert!(message.contains("not a regular file"), "{message}");
        }
        let after = fs::symlink_metadata(&path).unwrap().file_type();
        assert_eq!(after, before, "{name}");
    }
    assert_eq!(fs::read_to_string(tree.path("target")).unwrap(), "before\n");
}

#[test]
fn check_has_its_status_without_a_reader() {
    let tree = Tree::new("disks");
    for words in [&["check"][..], &["check", "--json"]] {
        let (output, reader) = UnixStream::pair().unwrap();
        drop(reader);
        let child = program(&tree, words)
            .stdout(OwnedFd::from(output))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(1), ""));
    }
}

#[test]
fn recorded_samples_become_a_picture() {
    let tree = Tree::new("disks");
    let samples = run(
        &tree,
        &["status", "--json", "--every", "0.002", "--count", "2"],
    );
    tree.write("samples", text(&samples.stdout));
    let picture = run(&tree, &["plot", tree.path("samples").to_str().unwrap()]);
    assert!(picture.status.success() && text(&picture.stdout).starts_with("<svg"));
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let tree = Tree::new("disks");
    let mut child = program(&tree, &["status", "--every", "0.001"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    // The pipe is closed now: the program ends with its next sample.
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""));
}
