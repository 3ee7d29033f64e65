//! Main memory: of the machine, and what its control group leaves of it.

use std::path::Path;

/// Main memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Of the machine.
    pub total: u64,
    /// That can be had without swapping.
    pub available: u64,
    /// The tightest limit of the process's control groups.
    pub limit: Option<Limit>,
}

/// A control group's limit, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// At most this.
    pub bytes: u64,
    /// What of it is in use, the cache of files apart.
    pub used: u64,
}

impl Memory {
    /// What the kernel tells; `None` where it tells nothing.
    pub fn read() -> Option<Self> {
        let (total, available) = meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?)?;
        let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let limit = limit(&groups, Path::new("/sys/fs/cgroup")).filter(|limit| limit.bytes < total);
        Some(Self { total, available, limit })
    }

    /// What this process can have.
    pub fn usable(&self) -> u64 {
        let within = self.limit.map_or(u64::MAX, |limit| limit.bytes.saturating_sub(limit.used));
        self.available.min(within)
    }
}

/// `MemTotal` and `MemAvailable` of `/proc/meminfo`.
fn meminfo(text: &str) -> Option<(u64, u64)> {
    let field = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    Some((field("MemTotal")?, field("MemAvailable")?))
}

/// The tightest limit of the groups in `/proc/self/cgroup` and those above them. Inside a container the path may be
/// that of the host; then only the root of `mount` is there to be read.
fn limit(groups: &str, mount: &Path) -> Option<Limit> {
    let mut limits = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (root, files) = match controllers {
            "" => (mount.to_path_buf(), ["memory.max", "memory.current", "inactive_file"]),
            v1 if v1.split(',').any(|name| name == "memory") => (
                mount.join("memory"),
                ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"],
            ),
            _ => continue,
        };
        let own = root.join(path.trim_start_matches('/'));
        let above = own.ancestors().take_while(|dir| dir.starts_with(&root));
        limits.extend(above.filter_map(|dir| {
            let number =
                |name: &str| std::fs::read_to_string(dir.join(name)).ok()?.trim().parse::<u64>().ok();
            let stat = std::fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
            let cached =
                stat.lines().find_map(|line| line.strip_prefix(files[2])?.trim().parse::<u64>().ok());
            let used = number(files[1]).unwrap_or(0).saturating_sub(cached.unwrap_or(0));
            Some(Limit { bytes: number(files[0])?, used })
        }));
    }
    limits.into_iter().min_by_key(|limit| limit.bytes.saturating_sub(limit.used))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn meminfo_is_in_kibibytes() {
        let text = "MemTotal:       16384 kB\nMemFree:            1 kB\nMemAvailable:    8192 kB\n";
        assert_eq!(meminfo(text), Some((16 << 20, 8 << 20)));
        assert_eq!(meminfo("MemTotal: 16384 kB\n"), None);
        assert_eq!(meminfo("MemTotal: x kB\nMemAvailable: 1 kB\n"), None);
        assert_eq!(meminfo("MemTotal: 18446744073709551615 kB\nMemAvailable: 1 kB\n"), None);
    }

    #[test]
    fn the_tightest_group_counts() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("a/memory.max", "1000\n");
        write("a/memory.current", "300\n");
        write("a/memory.stat", "anon 1\ninactive_file 100\n");
        write("a/b/memory.max", "max\n");
        assert_eq!(limit("0::/a/b\n", dir.path()), Some(Limit { bytes: 1000, used: 200 }));
        assert_eq!(limit("0::/elsewhere\n", dir.path()), None);
        // Of the first version, with a limit at its root.
        write("memory/memory.limit_in_bytes", "500\n");
        write("memory/memory.usage_in_bytes", "1\n");
        let groups = "3:cpu:/x\n4:memory,hugetlb:/host/path\nnonsense\n";
        assert_eq!(limit(groups, dir.path()), Some(Limit { bytes: 500, used: 1 }));
    }

    #[test]
    fn a_process_can_have_what_both_leave() {
        let limit = Some(Limit { bytes: 50, used: 20 });
        assert_eq!(Memory { total: 100, available: 40, limit }.usable(), 30);
        assert_eq!(Memory { total: 100, available: 40, limit: None }.usable(), 40);
    }
}
