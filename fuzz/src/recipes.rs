//! Recipes.

use crate::folder::Folder;
use crate::recipe::Recipe;

pub fn recipe(bytes: &[u8]) {
    let folder = Folder::new();
    let path = folder.write("recipe.toml", bytes);
    if let Ok(recipe) = Recipe::read(&path, &[]) {
        let saved = recipe.to_toml().expect("what was read can be written");
        let again = folder.write("recipe.toml", saved.as_bytes());
        Recipe::read(&again, &[]).expect("a run's own recipe");
    }
}
