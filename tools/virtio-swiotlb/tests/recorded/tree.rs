// SPDX-License-Identifier: GPL-2.0

//! Trees that `tests/record` recorded in guests.

use std::{fs, os::unix::fs::symlink, path::Path};
use virtio_swiotlb::{root::Root, snapshot::Snapshot};

/// A recorded tree in a directory of its own.
pub(crate) struct Tree(tempfile::TempDir);

impl Tree {
    /// Unpacks tests/trees/NAME.
    pub(crate) fn new(name: &str) -> Self {
        let recorded = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/trees")
            .join(name);
        let directory = tempfile::tempdir().unwrap();
        let tree = Self(directory);
        let mut file: Option<(String, String)> = None;
        let text = fs::read_to_string(recorded).unwrap();
        for line in text.lines().chain(["#"]) {
            if let Some(content) = line.strip_prefix('|') {
                let (_, text) = file.as_mut().unwrap();
                *text += content;
                text.push('\n');
                continue;
            }
            if let Some((path, text)) = file.take() {
                tree.write(&path, &text);
            }
            if let Some(path) = line.strip_prefix("== ") {
                file = Some((path.to_owned(), String::new()));
            } else if let Some(link) = line.strip_prefix("-> ") {
                let (path, target) = link.split_once(' ').unwrap();
                let path = tree.path(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                symlink(target, path).unwrap();
            }
        }
        tree
    }

    /// Where a file of the tree is.
    pub(crate) fn path(&self, path: &str) -> std::path::PathBuf {
        self.0.path().join(path)
    }

    /// Replaces a file.
    pub(crate) fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Removes a directory or a file.
    pub(crate) fn remove(&self, path: &str) {
        let path = self.path(path);
        if path.is_dir() {
            fs::remove_dir_all(path).unwrap();
        } else {
            fs::remove_file(path).unwrap();
        }
    }

    /// Replaces text in a file, which has to be there.
    pub(crate) fn replace(&self, path: &str, before: &str, after: &str) {
        let text = fs::read_to_string(self.path(path)).unwrap();
        assert!(text.contains(before), "{path} has no {before:?}");
        self.write(path, &text.replace(before, after));
    }

    pub(crate) fn root(&self) -> Root {
        Root::new(self.0.path())
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot::read(&self.root()).unwrap()
    }
}
