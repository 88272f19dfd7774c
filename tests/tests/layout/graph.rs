//! The import graph: cycles between files and between folders.

use std::collections::{BTreeMap, BTreeSet};

/// The modules of one library or program, and the imports between their files.
#[derive(Default)]
pub struct Graph {
    /// The module path of each file.
    pub files: Vec<Vec<String>>,
    /// Pairs of importing and imported file.
    pub imports: BTreeSet<(usize, usize)>,
}

/// Groups of modules that import each other.
pub struct Cycles {
    pub files: Vec<Vec<String>>,
    pub folders: Vec<Vec<String>>,
}

impl Graph {
    pub fn name_of(&self, file: usize) -> String {
        if self.files[file].is_empty() { "(root)".to_owned() } else { self.files[file].join("::") }
    }

    pub fn cycles(&self) -> Cycles {
        let names = |group: Vec<usize>| group.into_iter().map(|file| self.name_of(file)).collect();
        let files = cycles(self.files.len(), &self.imports).into_iter().map(names).collect();
        let mut folders = Vec::new();
        for (parent, edges) in self.units() {
            let (units, edges) = numbered(&edges);
            for group in cycles(units.len(), &edges) {
                let paths: Vec<Vec<String>> =
                    group.iter().map(|unit| [&parent[..], &[units[*unit].clone()]].concat()).collect();
                let is_folder = |path: &Vec<String>| {
                    self.files.iter().any(|file| file.len() > path.len() && file.starts_with(path))
                };
                // A cycle between files of one folder is in the list of files.
                if paths.iter().any(is_folder) && !self.files_form(&paths, &parent) {
                    folders.push(paths.iter().map(|path| path.join("::")).collect());
                }
            }
        }
        Cycles { files, folders }
    }

    /// Whether the units' own files, without those below, form the same cycle.
    fn files_form(&self, units: &[Vec<String>], parent: &[String]) -> bool {
        let is_own = |file: &usize| {
            let path = &self.files[*file];
            path == parent || units.contains(path)
        };
        let edges = self.imports.iter().filter(|(from, to)| is_own(from) && is_own(to)).copied().collect();
        cycles(self.files.len(), &edges).iter().any(|group| group.len() == units.len())
    }

    /// The imports between the parts of each folder, by folder. `mod.rs` is a part of its own.
    fn units(&self) -> BTreeMap<Vec<String>, BTreeSet<(String, String)>> {
        let mut units: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        for (from, to) in &self.imports {
            let (from, to) = (&self.files[*from], &self.files[*to]);
            let common = from.iter().zip(to).take_while(|(a, b)| a == b).count();
            let unit = |path: &[String]| path.get(common).map_or("mod.rs", String::as_str).to_owned();
            units.entry(from[..common].to_vec()).or_default().insert((unit(from), unit(to)));
        }
        units
    }

    /// The least number of imports between top-level modules that point up, over all orders of these modules.
    pub fn upward_imports(&self) -> usize {
        let mut units = self.units();
        let (units, edges) = numbered(&units.remove(&Vec::new()).unwrap_or_default());
        cycles(units.len(), &edges).iter().map(|group| least_upward(group, &edges)).sum()
    }
}

fn numbered(edges: &BTreeSet<(String, String)>) -> (Vec<String>, BTreeSet<(usize, usize)>) {
    let units: BTreeSet<&String> = edges.iter().flat_map(|(from, to)| [from, to]).collect();
    let units: Vec<String> = units.into_iter().cloned().collect();
    let number = |name: &String| units.binary_search(name).unwrap_or_default();
    let edges = edges.iter().map(|(from, to)| (number(from), number(to))).collect();
    (units, edges)
}

/// Exact, by dynamic programming: `best[set]` is the least number of upward imports if the modules in `set` are the
/// lowest.
fn least_upward(group: &[usize], edges: &BTreeSet<(usize, usize)>) -> usize {
    assert!(group.len() <= 22, "a cycle of {} modules is too large to order", group.len());
    let imports_of = |from: usize| {
        group
            .iter()
            .enumerate()
            .filter(|(_, to)| edges.contains(&(from, **to)))
            .fold(0_usize, |set, (bit, _)| set | 1 << bit)
    };
    let imports: Vec<usize> = group.iter().map(|unit| imports_of(*unit)).collect();
    let mut best = vec![usize::MAX; 1 << group.len()];
    best[0] = 0;
    for set in 0..best.len() {
        for (bit, imported) in imports.iter().enumerate().filter(|(bit, _)| set & (1 << bit) == 0) {
            // `set` is below the module, so what it imports outside of `set` is above it.
            let upward = (imported & !set).count_ones() as usize;
            let next = set | 1 << bit;
            best[next] = best[next].min(best[set] + upward);
        }
    }
    best[best.len() - 1]
}

/// The strongly connected groups of more than one node, sorted.
fn cycles(count: usize, edges: &BTreeSet<(usize, usize)>) -> Vec<Vec<usize>> {
    let reach: Vec<BTreeSet<usize>> = (0..count)
        .map(|start| {
            let (mut seen, mut open) = (BTreeSet::new(), vec![start]);
            while let Some(node) = open.pop() {
                open.extend(edges.range((node, 0)..(node + 1, 0)).map(|(_, to)| *to).filter(|to| seen.insert(*to)));
            }
            seen
        })
        .collect();
    let joined = |a: usize, b: usize| reach[a].contains(&b) && reach[b].contains(&a);
    let groups: BTreeSet<Vec<usize>> =
        (0..count).map(|node| (0..count).filter(|other| joined(node, *other)).collect()).collect();
    groups.into_iter().filter(|group| group.len() > 1).collect()
}

#[test]
fn folders_can_form_a_cycle_that_no_files_form() {
    let path = |text: &str| text.split("::").map(str::to_owned).collect::<Vec<_>>();
    let files = ["a::one", "a::two", "b::one", "b::two"].map(path).to_vec();
    let graph = Graph { files, imports: BTreeSet::from([(0, 2), (3, 1)]) };
    let cycles = graph.cycles();
    assert!(cycles.files.is_empty(), "{:?}", cycles.files);
    assert_eq!(cycles.folders, [["a", "b"]]);
    assert_eq!(graph.upward_imports(), 1);
}
